"""Every option of the recipe has bounds, and what no step can work with is refused when the recipe is read."""

from __future__ import annotations

import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import annotated_types
import pytest
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from nvila.components.contracts.errors import ConfigError
from nvila.components.contracts.recipe.form import Form, fill_in
from nvila.components.contracts.recipe.reader import file_document, layers
from nvila.components.contracts.recipe.recipe import Recipe


def _leaves(kind: Any, marks: tuple[Any, ...], path: str) -> Iterator[tuple[str, Any, tuple[Any, ...]]]:
    """Each type in an option with what its annotation says of it."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Annotated:
        inner = [m for mark in arguments[1:] for m in (mark.metadata if isinstance(mark, FieldInfo) else [mark])]
        yield from _leaves(arguments[0], (*marks, *inner), path)
    elif origin in (typing.Union, types.UnionType):
        for one in arguments:
            yield from _leaves(one, marks, path)
    elif origin in (list, dict, tuple):
        yield path, origin, marks
        for number, one in enumerate(arguments):
            yield from _leaves(one, (), f"{path}[{number}]")
    elif isinstance(kind, type) and issubclass(kind, BaseModel):
        for name, option in kind.model_fields.items():
            yield from _leaves(option.annotation, tuple(option.metadata), f"{path}.{option.alias or name}".strip("."))
    else:
        yield path, kind, marks


def _bounds(marks: tuple[Any, ...]) -> set[str]:
    low = any(isinstance(mark, annotated_types.Ge | annotated_types.Gt) for mark in marks)
    high = any(isinstance(mark, annotated_types.Le | annotated_types.Lt) for mark in marks)
    longest = any(isinstance(mark, annotated_types.MaxLen) for mark in marks)
    return {name for name, there in (("low", low), ("high", high), ("longest", longest)) if there}


def test_every_number_text_and_list_has_bounds() -> None:
    """An option without them takes what fails in the fifth stage, or in a message that nobody can read."""
    leaves = list(_leaves(Recipe, (), ""))
    assert len(leaves) > 120 and "model.base.tower.hidden" in {path for path, _, _ in leaves}
    unbounded = [
        path
        for path, kind, marks in leaves
        if (kind in (int, float) and not _bounds(marks) >= {"low", "high"})
        or (kind in (str, list, dict) and "longest" not in _bounds(marks))
    ]
    assert unbounded == []


def test_every_option_is_described() -> None:
    """What an editor shows, and the reference of all keys, would have gaps."""
    kinds, seen = [Recipe], set[type[BaseModel]]()
    while kinds:
        kind = kinds.pop()
        seen.add(kind)
        assert kind.__doc__
        missing = [name for name, option in kind.model_fields.items() if not option.description]
        assert missing == [], kind
        for option in kind.model_fields.values():
            found = [option.annotation, *typing.get_args(option.annotation)]
            found += [part for one in found for part in typing.get_args(one)]
            kinds += [one for one in found if isinstance(one, type) and issubclass(one, BaseModel) and one not in seen]


def refusal(overrides: dict[str, Any], recipe: str = "micro") -> str:
    with pytest.raises(ConfigError) as caught:
        fill_in(Form(recipe=recipe, overrides=overrides))
    assert len(str(caught.value)) <= 1500
    return str(caught.value)


def _nested(dotted: str, value: Any) -> dict[str, Any]:
    for part in reversed(dotted.split(".")):
        value = {part: value}
    return typing.cast(dict[str, Any], value)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("seed", 2**70),
        ("seed", -1),
        ("quantize.group_size", 0),
        ("quantize.group_size", -1),
        ("quantize.group_size", 48),
        ("quantize.calibration_samples", 0),
        ("quantize.calibration_samples", -5),
        ("quantize.smoothquant_alpha", 7),
        ("quantize.smoothquant_alpha", -1),
        ("data.validation.max_pixels", -1),
        ("data.validation.max_pixels", 9),
        ("data.validation.max_video_seconds", -1),
        ("data.validation.max_text_chars", 0),
        ("data.validation.min_source_share", 0.5),
        ("rollout.policy.pinned_prompts", 0),
        ("rollout.policy.deadline_seconds", -1),
        ("rollout.host", "h" * 300),
        ("rollout.host", ".."),
        ("rollout.host", "http://a"),
        ("train.stages.train-1.data", {"shapes.captions": 1e-9}),
        ("train.stages.train-1.data", {"shapes.captions": 1e12}),
        ("train.stages.train-1.learning_rate", 5),
        ("train.stages.train-1.warmup_ratio", 1.0),
        ("train.stages.train-1.trainable", ["llm", "llm"]),
        ("train.checkpoint_seconds", 1e12),
        ("evaluate.gate.min_accuracy", {"shapes": 7}),
        ("evaluate.limit", 9),
        ("evaluate.max_new_tokens", 512),
        ("evaluate.sources", ["shapes", "shapes"]),
        ("model.select_layer", -4),
        ("model.base.decoder.vocabulary", 100),
        ("model.base.decoder.heads", 64),
        ("model.base.tower.hidden", 10**9),
        ("needs.memory_bytes", 10**39),
        ("prune.keep_ratio", 0),
        ("prune.within", ["answer", "answer"]),
        ("data.sources.shapes.path", "x" * 5000),
        ("data.sources.shapes.path", ""),
        ("name", "a" * 400),
    ],
    ids=str,
)
def test_what_no_step_can_work_with_is_refused(option: str, value: Any) -> None:
    """Each was found by a step after hours, or never: a gate that no model passes, a pool that divides no frame."""
    assert option.replace("train-1", "0").replace("shapes.path", "0.path") in refusal(_nested(option, value))


@pytest.mark.parametrize("value", ["yes", "64", "1_000", True, 64.5, None, [64]], ids=repr)
def test_only_a_number_is_one(value: Any) -> None:
    """`batch: yes` was a batch of one, and `"1_000"` a thousand."""
    assert "evaluate.batch" in refusal({"evaluate": {"batch": value}}) if value is not None else True
    assert "train.stages.0.batch" in refusal({"train": {"stages": {"train-1": {"batch": value}}}})


def test_pools_divide_the_tokens_of_a_frame() -> None:
    """It was found by the first clip of the fifth stage."""
    video = {"frames": 8, "pool_sizes": [[2, 3, 3]]}
    model = {"vision_mode": "resize", "s2_scales": [56], "video": video}
    assert "model.video.pool_sizes.0: a pool does not divide the 2 x 2 tokens" in refusal({"model": model})


def test_a_copy_has_a_model_of_its_own(tmp_path: Path) -> None:
    """A copy of a shipped recipe registered its models as versions of that one's."""
    mine = tmp_path / "My plates.yaml"
    for text, name in (
        ("extends: micro", "my-plates"),
        ("extends: micro\nname: null", "my-plates"),
        ("extends: micro\nname: other", "other"),
    ):
        mine.write_text(text)
        recipe = layers(file_document(mine)).recipe()
        assert (recipe.name, recipe.register_.model_name) == (name, f"nvila-{name}")
    mine.write_text("extends: nvila-8b\nname: nvila-mine\nregister: {model_name: null}")
    assert layers(file_document(mine)).recipe().register_.model_name == "nvila-mine"
    mine.write_text("extends: nvila-8b\nregister: {model_name: plates}")
    assert layers(file_document(mine)).recipe().register_.model_name == "plates"


def test_gates_that_let_everything_pass_are_named() -> None:
    """A copy of micro inherits them, and its user believes that somebody looked."""
    assert "evaluate.gate" in (words := fill_in(Form(recipe="micro")).open_gates) and "quantize.gate" in words
    assert fill_in(Form(recipe="tiny")).open_gates == ""
    asked = {"evaluate": {"gate": {"min_accuracy": {"shapes": 0.1}}}, "quantize": {"gate": {"max_loss": 0.9}}}
    assert fill_in(Form(recipe="micro", overrides=asked)).open_gates == ""
