"""The tables of the pipelines, and which recipe is of which."""

from __future__ import annotations

from typing import Any

import pytest

from nvila.components.contracts.errors import ConfigError
from nvila.components.contracts.pipelines import PIPELINES, without
from nvila.components.contracts.recipe.form import Form, fill_in, given
from nvila.components.contracts.recipe.layers import parse_recipe
from nvila.components.contracts.recipe.recipe import Recipe, slices
from nvila.components.contracts.steps import ROWS, STEPS

START = {"model": {"base": {"model": "some@champion"}}}


def recipe(**changes: Any) -> dict[str, Any]:
    """A recipe that fine-tunes."""
    stage = {"name": "tuning", "trainable": ["llm"], "learning_rate": 1e-4, "data": {"mine.sft": 1}, "batch": 8}
    return {
        "name": "r",
        **START,
        "data": {"sources": [{"name": name, "kind": "image", "path": f"data/{name}"} for name in ("mine", "old")]},
        "train": {"stages": [stage]},
        "evaluate": {"sources": ["mine", "old"]},
    } | changes


def test_a_step_that_is_left_out_hands_on_its_input() -> None:
    """Left to a second copy of the rows, the model of a stage that is gone would be asked for, or that of another."""
    table = {row.name: row for row in without(STEPS, ["train-2", "train-3", "prune-image"])}
    assert table["train-4"].inputs == {"model": "train-1", "samples": "validate", "kept_image": "validate"}
    assert {name for name, row in table.items() if row != ROWS[name]} == {"train-4", "train-5"}
    with pytest.raises(ValueError, match="nothing goes on in the place of validate"):
        without(STEPS, ["validate"])


@pytest.mark.parametrize("name", PIPELINES)
def test_every_table_can_be_built_from_top_to_bottom(name: Any) -> None:
    """A step in front of one that it reads cannot be built."""
    known: set[str] = set()
    for row in PIPELINES[name].steps:
        assert row.before <= known, row.name
        known.add(row.name)
    assert PIPELINES[name].form.keys() <= Form.model_fields.keys()


def test_the_recipe_says_which_pipeline_it_is_for() -> None:
    """The wrong table has no slice for a step, or steps that nobody asked for."""
    made = parse_recipe(recipe())
    assert (made.pipeline.name, fill_in(Form(recipe="micro")).pipeline.name) == ("finetune", "lifecycle")
    cut = slices(made)
    assert set(cut) == set(made.pipeline.rows) - {"resolve", "report"}
    assert cut["train-2"] is cut["train-3"] is None and cut["initialize"]["model"] == START["model"]
    form = Form(recipe="tiny-finetune", start_from="hf://owner/name@main")
    assert fill_in(form).model.base.model == "hf://owner/name@main"
    assert {"start_from"} == given(form, made.pipeline).keys() - given(form, PIPELINES["lifecycle"]).keys()


def test_what_the_checkpoint_decides_is_no_option() -> None:
    """A key that says otherwise than the checkpoint, or the same by chance, would have no effect without a word."""
    for name, value in {"vision_mode": "dynamic_s2", "max_tiles": 12, "max_length_tokens": 8192, "video": {}}.items():
        with pytest.raises(ConfigError, match=rf"model\.{name}: {name} is what the model of base\.model has"):
            parse_recipe(recipe(model={**START["model"], name: value}))
    for name, value in {"llm": "x", "tower": {}, "learning_rate": 1e-3}.items():
        with pytest.raises(ConfigError, match=rf"model\.base\.{name}: base\.model is a whole model"):
            parse_recipe(recipe(model={"base": {"model": "x", name: value}}))


def test_a_recipe_that_starts_from_a_model_is_the_same_when_it_is_read_again() -> None:
    """Steps read slices, and `resolve` the whole: defaults written out would be options that the checkpoint decides."""
    made = parse_recipe(recipe())
    assert made.model_dump(mode="json")["model"] == START["model"]
    assert Recipe.model_validate(made.model_dump(mode="json", by_alias=True)) == made
    assert fill_in(Form(recipe="tiny-finetune"), root="/nvila").pipeline.name == "finetune"


def test_stages_without_a_step_and_pruning_are_refused() -> None:
    """A fourth stage would be left out without a word, and so would what `pruned` asks for."""
    stage = recipe()["train"]["stages"][0]
    with pytest.raises(ConfigError, match="4 stages, and this pipeline has training steps for 3"):
        slices(parse_recipe(recipe(train={"stages": [stage] * 4})))
    with pytest.raises(ConfigError, match="reads no scores of mine"):
        slices(parse_recipe(recipe(train={"stages": [stage | {"pruned": True}]})))


def test_the_gate_holds_what_was_drawn_against_the_start() -> None:
    """Held on all sources, a watched one that is forgotten a little ends the run; on none, a spoilt model goes on."""
    assert parse_recipe(recipe()).gate.not_below_base == ["mine"]
    asked = {"sources": ["mine", "old"], "gate": {"not_below_base": [], "max_forgotten": {"old": 0.1}}}
    made = parse_recipe(recipe(evaluate=asked))
    assert (made.gate.not_below_base, made.gate.max_forgotten) == ([], {"old": 0.1})
    assert slices(made)["gate"] == {"gate": made.gate.model_dump()}
    for wrong in ({"max_forgotten": {"digits": 0.1}}, {"not_below_base": ["digits"]}):
        with pytest.raises(ConfigError, match="no whole model is fine-tuned"):
            fill_in(Form(recipe="micro", overrides={"evaluate": {"gate": wrong}}))
