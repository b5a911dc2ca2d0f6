"""Recipes that extend others: what is laid over what, where a value comes from, and what is refused."""

from __future__ import annotations

import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from nvila.components.contracts.errors import ConfigError
from nvila.components.contracts.recipe.layers import Layers
from nvila.components.contracts.recipe.reader import document, file_document, layers
from nvila.components.contracts.recipe.recipe import Recipe

TINY = layers(document("tiny"))
BOMB = "- &a0 [a]\n" + "".join(f"- &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 12))
"""A few lines, and 10 to the power of 11 texts."""


def over(text: str) -> Recipe:
    """What a recipe that extends `tiny` comes to."""
    return layers(document(f"extends: tiny\n{text}")).recipe()


def test_only_what_differs_is_written() -> None:
    """A section that is named must not lose the options that are not."""
    wanted = TINY.recipe().model_dump()
    wanted["name"], wanted["model"]["video"]["frames"] = "mine", 4
    wanted["register_"]["model_name"] = "nvila-mine"
    assert over("name: mine\nmodel: {video: {frames: 4}}").model_dump() == wanted


def test_lists_and_tables_replace() -> None:
    """Half of another recipe's mixture would be trained on, or refused, when its sources are gone."""
    recipe = over("train: {stages: {train-5: {data: {clips.sft: 1}}}}\nmodel: {s2_scales: [28, 56, 84], max_tiles: 9}")
    assert recipe.train.stages[4].data == {"clips.sft": 1}
    assert recipe.model.s2_scales == [28, 56, 84]
    assert recipe.train.stages[:4] == TINY.recipe().train.stages[:4]


def test_null_takes_a_value_back() -> None:
    """Without it a recipe could not go back to the default of an option that the other sets."""
    recipe = over("evaluate: {limit: null, gate: null}\ntrain: {stages: {train-4: {clip_norm: null}}}")
    assert (recipe.evaluate.limit, recipe.evaluate.gate.min_accuracy, recipe.evaluate.batch) == (None, {}, 64)
    assert [stage.clip_norm for stage in recipe.train.stages] == [None, None, None, None, 1.0]
    with pytest.raises(ConfigError, match=r"recipe key model\.base is missing"):
        over("model: {base: null}")


def _options(section: type[BaseModel], above: str = "") -> Iterator[tuple[str, Any]]:
    for name, option in section.model_fields.items():
        yield f"{above}{name}", option
        kinds = [option.annotation]
        for kind in kinds:
            kinds += typing.get_args(kind)
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                yield from _options(kind, f"{above}{name}.")


def test_null_has_one_meaning() -> None:
    """An option for which null is a value, but not its default, could not be set to it."""
    optional = {
        path: option.default
        for path, option in _options(Recipe)
        if typing.get_origin(option.annotation) in (typing.Union, types.UnionType)
        and types.NoneType in typing.get_args(option.annotation)
    }
    assert "evaluate.limit" in optional and set(optional.values()) == {None}


def test_a_stage_is_left_out_by_its_step() -> None:
    """A recipe would have to copy the other four to do without one."""
    stages = over("train: {stages: {train-2: null}}").train.stages
    assert (
        stages[1] is None
        and stages[0:1] + stages[2:] == TINY.recipe().train.stages[0:1] + TINY.recipe().train.stages[2:]
    )


def test_a_stage_that_is_left_out_says_by_whom() -> None:
    """A stage that is missing from a long recipe is looked for in the wrong file."""
    laid = layers(document("extends: tiny\nname: mine\ntrain: {stages: {train-2: null}}"))
    laid = laid.over({"train": {"stages": {"train-3": None, "train-4": {"clip_norm": None}}}}, "over it")
    stages = ("train", "stages")
    assert [laid.source((*stages, index)) for index in (1, 2)] == ["recipe", "over it"]
    assert laid.source((*stages, 3, "clip_norm")) is None


def test_sources_are_changed_by_name() -> None:
    """Whoever moves one source would have to write down all of them."""
    recipe = over("data: {sources: {digits: {path: data/mine}}}")
    assert [source.path for source in recipe.data.sources] == ["data/tiny/shapes", "data/mine", "data/tiny/clips"]


@pytest.mark.parametrize("entry", ["4", "train-6", "stage 4", "digit"])
def test_an_entry_that_is_not_there(entry: str) -> None:
    """A number may count from 0 or from 1: in a file it would change the wrong stage."""
    with pytest.raises(ConfigError, match=r"has no entry .*There are train-1, .*train-5|the key 4 is no text"):
        over(f"train: {{stages: {{{entry}: {{batch: 8}}}}}}")


def _write(folder: Path, **texts: str) -> Path:
    for name, text in texts.items():
        (folder / f"{name}.yaml").write_text(text)
    return folder / "mine.yaml"


def test_files_extend_files_relative_to_themselves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same file would mean something else in another working directory."""
    (tmp_path / "team").mkdir()
    _write(tmp_path / "team", base="extends: ../root.yaml\nseed: 2\nname: base\n", mine="")
    mine = _write(tmp_path, root="extends: tiny\nseed: 1\nname: root\n", mine="extends: team/base.yaml\nname: mine\n")
    monkeypatch.chdir("/")
    laid = layers(file_document(mine))
    assert (laid.recipe().name, laid.recipe().seed) == ("mine", 2)
    assert laid.source(["name"]) == str(mine)
    assert laid.source(["seed"]) == str(tmp_path / "team/base.yaml")
    assert laid.source(["train", "stages", 3, "batch"]) == "tiny"
    assert laid.source(["train", "stages", 3, "weight_decay"]) is None


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ({"mine": "extends: mine.yaml"}, r"in a circle: .*mine\.yaml -> .*mine\.yaml"),
        ({"mine": "extends: a.yaml", "a": "extends: ../X/mine.yaml"}, r"in a circle: .*mine.* -> .*a\.yaml -> .*mine"),
        ({"mine": "extends: tinny"}, r"mine\.yaml: extends: no recipe of that name \(got 'tinny'\)"),
        ({"mine": "extends: none.yaml"}, r"none\.yaml: no such recipe file"),
        ({"mine": "extends: [tiny]"}, r"mine\.yaml: extends: not the name of a recipe"),
        ({"mine": "extend: tiny"}, r"mine\.yaml: 5 mistakes\n  unknown recipe key extend\. Did you mean extends\?\n"),
        ({"mine": "extends: a.yaml", "a": "trian: {}"}, r"a\.yaml: unknown recipe key trian\. Did you mean train\?"),
        (
            {"mine": "extends: tiny\ntrain: {stages: {train-4: {bach: 8}}}"},
            r"mine\.yaml: unknown recipe key train\.stages\.train-4\.bach\. Did you mean train\.stages\.train-4\.batch",
        ),
        (
            {"mine": "extends: a.yaml", "a": "extends: tiny\ntrain: {stages: {train-4: {batch: none}}}"},
            r"a\.yaml: train\.stages\.3\.batch: Input should be a valid integer",
        ),
        ({"mine": "extends: tiny\ndata: plates"}, r"mine\.yaml: data: Input should be .*\(got 'plates'\)"),
        ({"mine": "seed: 1"}, r"mine\.yaml: 4 mistakes\n  recipe key model is missing\n"),
        ({"mine": "extends: " + "a" * 5000 + ".yaml"}, "cannot be read: .*File name too long"),
        (
            {"mine": "extends: a.yaml", "a": "seed: 1\nname: a\nseed: 2"},
            r"a\.yaml: cannot be read as YAML: line 3, column 1: the key seed stands twice",
        ),
        (
            {"mine": "extends: tiny\ntrain: {stages: {train-4: {batch: 8}, train-4: null}}"},
            r"mine\.yaml: cannot be read as YAML: line 2, column 39: the key train-4 stands twice",
        ),
        (
            {"mine": "extends: tiny\nevaluate: {sources: !!set {shapes}}"},
            r"mine\.yaml: cannot be read as YAML: .*values of the type !!set",
        ),
        ({"mine": "extends: tiny\ndata: {sources: {digit: {path: x}}}"}, r"mine\.yaml: data\.sources has no entry"),
        ({"mine": BOMB}, r"mine\.yaml: cannot be read as YAML: more than 20,000 values"),
        ({"mine": "extends: [a, [b]]"}, r"mine\.yaml: extends: not the name of a recipe$"),
        ({"mine": "extends: tiny\n<<: {seed: 1}"}, r"mine\.yaml: unknown recipe key <<\. YAML 1\.2 has no merge keys"),
    ],
)
def test_what_cannot_be_extended_is_refused(tmp_path: Path, texts: dict[str, str], message: str) -> None:
    """With several files about, the message must name the one to mend."""
    texts = {name: text.replace("X", tmp_path.name) for name, text in texts.items()}
    with pytest.raises(ConfigError, match=message):
        layers(file_document(_write(tmp_path, **texts))).recipe()


def test_a_text_extends_no_file() -> None:
    """What a form holds would be read from the folder of a pod."""
    with pytest.raises(ConfigError, match=r"extends no file \(got '/etc/mine.yaml'\).*nvila submit FILE"):
        layers(document("extends: /etc/mine.yaml\nname: mine"))


def test_layers_do_not_change_what_they_lie_over() -> None:
    """A recipe that is read once and extended twice would hold both."""
    before = TINY.content
    TINY.over({"train": {"stages": {"train-1": {"batch": 8}}}, "seed": 3}, "a")
    assert TINY.content == before
    assert Layers("empty").content == {}
