"""`--override dotted.key=value`, and what a command makes of a recipe and its overrides."""

from pathlib import Path

import pytest

from nvila.components.contracts.errors import ConfigError
from nvila.components.contracts.recipe.form import fill_in
from nvila.components.contracts.recipe.reader import document, layers
from nvila.components.contracts.recipe.recipe import Recipe
from nvila.pipelines.commands.overrides import asked_for, parse_overrides

TINY = layers(document("tiny"))


def changed(*pairs: str) -> Recipe:
    """The recipe `tiny` under overrides."""
    return TINY.over(parse_overrides(TINY, pairs), "test").recipe()


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("7", 7),
        ("1e-3", 0.001),
        ("null", None),
        ("true", True),
        ("gptq", "gptq"),
        ("2026-11-23", "2026-11-23"),
        ("[a, b]", ["a", "b"]),
        ("", None),
    ],
)
def test_values_get_the_type_they_look_like(text: str, value: object) -> None:
    """`1e-3` is a string to YAML 1.1: a learning rate given that way would be refused by the schema. And a model named
    by a day is a date to it, which JSON does not know.
    """
    assert parse_overrides(TINY, [f"evaluate.limit={text}"]) == {"evaluate": {"limit": value}}


@pytest.mark.parametrize("entry", ["3", "train-4"])
def test_one_field_of_one_stage(entry: str) -> None:
    """The other stages, and the other fields of this one, must come along."""
    recipe = changed(f"train.stages.{entry}.learning_rate=0.5", "train.stages.0.batch=8")
    wanted = TINY.recipe().model_dump()
    wanted["train"]["stages"][3]["learning_rate"] = 0.5
    wanted["train"]["stages"][0]["batch"] = 8
    assert recipe.model_dump() == wanted


def test_an_entry_of_a_list_that_should_hold_none() -> None:
    """A mistake in one override must be told as such, not as a fault of ours, by the next one."""
    with pytest.raises(ConfigError, match=r"evaluate\.sources"):
        changed("evaluate.sources=[{name: a}, {name: b}]", "evaluate.sources.0=b")


def test_one_entry_of_a_list_or_a_table() -> None:
    """A key that goes into a table must not drop its other entries, as a table that is given whole does."""
    recipe = changed("model.s2_scales.1=84", "model.max_tiles=9", "evaluate.gate.min_accuracy.clips=0.25")
    assert recipe.model.s2_scales == [28, 84]
    assert recipe.evaluate.gate.min_accuracy == {"digits": 0.4, "clips": 0.25}
    assert changed('evaluate.gate.min_accuracy={"clips": 0.25}').evaluate.gate.min_accuracy == {"clips": 0.25}
    assert changed("evaluate.gate.min_accuracy.digits=null").evaluate.gate.min_accuracy == {}


def test_the_last_of_two_values_counts() -> None:
    """A table that is given twice would be a mixture of both."""
    recipe = changed('evaluate.gate.min_accuracy={"clips": 0.5}', 'evaluate.gate.min_accuracy={"shapes": 0.25}')
    assert recipe.evaluate.gate.min_accuracy == {"shapes": 0.25}
    assert changed("seed=1", "seed=2").seed == 2


def test_several_overrides_of_one_section_add_up() -> None:
    """The second must not wipe out the first."""
    wanted = {"evaluate": {"batch": 1, "limit": 2}}
    assert parse_overrides(TINY, ["evaluate.batch=1", "evaluate.limit=2"]) == wanted


@pytest.mark.parametrize(
    "pair",
    [
        "evaluate.limit",
        "=3",
        "train.stages.7.batch=1",
        "train.stages.x.batch=1",
        "train.stages.².batch=1",
        "train.chekpoint_seconds=1",
        "model.s2_scales.2=14",
    ],
)
def test_what_cannot_be_meant_is_refused(pair: str) -> None:
    """A mistyped override that has no effect would train the wrong model for days."""
    with pytest.raises(ConfigError):
        changed(pair)


def test_a_recipe_that_extends_a_file_is_handed_on_whole(tmp_path: Path) -> None:
    """A step in a pod does not have the user's files; a recipe that extends a shipped one goes as it is written."""
    (tmp_path / "base.yaml").write_text("extends: micro\nname: base\nevaluate: {limit: 15}\n")
    (tmp_path / "mine.yaml").write_text("extends: base.yaml\nname: mine\nevaluate: {limit: null, batch: 3}\n")
    form, recipe = asked_for(str(tmp_path / "mine.yaml"), ["seed=4"], target="none")
    assert fill_in(form) == recipe
    assert (recipe.name, recipe.evaluate.batch, recipe.evaluate.limit, recipe.seed) == ("mine", 3, None, 4)
    assert "extends" not in form.recipe
    form, recipe = asked_for(str(tmp_path / "base.yaml"), [])
    assert form.recipe == (tmp_path / "base.yaml").read_text()
    assert fill_in(form) == recipe
    form, recipe = asked_for("micro", [])
    assert (form.recipe, form.overrides) == ("micro", {})


def test_relative_paths_begin_at_the_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A recipe beside its data would find them from one working directory only; a pod has none of these folders."""
    base = tmp_path / "team" / "base.yaml"
    base.parent.mkdir()
    base.write_text("extends: micro\ndata: {sources: {shapes: {path: data/shapes}}}\n")
    mine = tmp_path / "mine.yaml"
    mine.write_text("extends: team/base.yaml\ndata: {sources: {digits: {path: data/digits}}}\n")
    (tmp_path / "link").symlink_to(tmp_path / "team")

    def paths(*overrides: str, **options: bool) -> list[str]:
        form, recipe = asked_for(str(mine), overrides, **options)
        assert fill_in(form) == recipe
        return [source.path for source in recipe.data.sources]

    for typed in (mine, Path("mine.yaml"), Path("team/../mine.yaml")):
        monkeypatch.chdir(tmp_path)
        mine = tmp_path / typed
        assert paths() == ["team/data/shapes", "data/digits", "data/micro/clips"], "from its own folder"
    monkeypatch.chdir(base.parent)
    mine = Path("../mine.yaml")
    assert paths() == ["data/shapes", str(tmp_path / "data/digits"), "data/micro/clips"]
    assert paths("data.sources.digits.path=here") == ["data/shapes", "here", "data/micro/clips"]
    assert paths(here=False) == ["data/shapes", "data/digits", "data/micro/clips"], "below the shared volume"
