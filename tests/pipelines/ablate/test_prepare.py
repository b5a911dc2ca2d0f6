"""What all cases share."""

from typing import Any

import pytest

from nvila.components.contracts.errors import ConfigError
from nvila.components.contracts.recipe.form import Form, fill_in
from nvila.components.contracts.recipe.recipe import Recipe, slices
from nvila.pipelines.ablate.cases import METHODS
from nvila.pipelines.ablate.prepare import names, pruned_stages, with_scores

SHIPPED = "tiny-ablate"


def _recipe(**overrides: Any) -> Recipe:
    return fill_in(Form(recipe=SHIPPED, overrides=overrides))


def test_the_shared_part_ends_before_the_first_pruned_stage() -> None:
    """A stage 4 among what is shared would have been trained on what one method keeps."""
    recipe = _recipe()
    assert list(pruned_stages(recipe)) == ["train-4", "train-5"]
    wanted = ["validate", "initialize", "prune-image", "prune-video", "train-1", "train-2", "train-3"]
    assert names(recipe, spoilt=False) == wanted
    assert names(recipe, spoilt=True)[-3:] == ["ablate-spoil", "spoilt prune-image", "spoilt prune-video"]


def test_one_prune_step_works_out_what_every_method_needs() -> None:
    """A second scoring would cost as much as the first; one that a method misses would end the experiment half-way."""
    recipe = with_scores(_recipe(), METHODS)
    assert recipe.prune.methods == set(METHODS) - {"random"}
    assert with_scores(_recipe(), ("random",)).prune.methods == {"random"}, "chance asks no references"


def test_steps_before_pruning_have_the_keys_of_a_run() -> None:
    """Then `nvila run` of the recipe has made them, or need not make them again. No preflight is made here."""
    recipe = _recipe()
    plain, ours = slices(recipe), slices(with_scores(recipe, METHODS))
    assert {name for name in plain if plain[name] != ours[name]} <= {"preflight", "prune-image", "prune-video"}


def test_a_recipe_that_prunes_nothing_is_refused() -> None:
    """Every case would be the same training."""
    none = {"stages": {"train-4": {"pruned": False}, "train-5": {"pruned": False}}}
    with pytest.raises(ConfigError, match="no stage of the recipe is pruned"):
        pruned_stages(_recipe(train=none))


def test_the_shipped_recipe_passes_once_over_each_source_of_its_stage() -> None:
    """One epoch over each subset, as in the paper."""
    stages = pruned_stages(_recipe())
    assert stages["train-4"].data["shapes.sft"] == stages["train-4"].data["digits.sft"] == 1
    assert stages["train-5"].data["clips.sft"] == 1
