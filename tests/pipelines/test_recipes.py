"""The shipped recipes."""

import pytest

from nvila.components.contracts.recipe.form import Form, fill_in
from nvila.components.contracts.recipe.reader import shipped
from nvila.components.contracts.recipe.recipe import Recipe, slices

PAPER = ["nvila-lite-2b", "nvila-lite-8b", "nvila-8b", "nvila-15b", "nvila-8b-video"]


def _recipe(name: str) -> Recipe:
    return fill_in(Form(recipe=name))


def test_the_promised_recipes_are_shipped() -> None:
    """A renamed recipe would break everyone's command."""
    small = ["micro", "tiny", "tiny-ablate", "tiny-spatial", "tiny-lr-ratio", "tiny-finetune"]
    assert shipped() == sorted([*small, "nvila-8b-reference", "finetune", *PAPER])


@pytest.mark.parametrize("name", shipped())
def test_shipped_recipes_are_valid_and_named_like_their_file(name: str) -> None:
    """A schema change must not leave a shipped recipe behind."""
    assert _recipe(name).name == name


@pytest.mark.parametrize("name", shipped())
def test_every_step_has_a_slice(name: str) -> None:
    """A step without a slice would fail only after everything before it has run."""
    recipe = _recipe(name)
    assert set(slices(recipe)) == set(recipe.pipeline.rows) - {"resolve", "report"}


@pytest.mark.parametrize("name", PAPER)
def test_paper_recipes_hold_the_values_of_the_papers_table(name: str) -> None:
    """Table 8: rates, global batch, warm-up, weight decay and what is trainable; a slip here costs GPU-months."""
    stages = _recipe(name).train.stages
    assert [stage.learning_rate for stage in stages] == [1e-3, 5e-5, 5e-5, 2e-5, 2e-5]
    assert {(stage.batch, stage.warmup_ratio, stage.weight_decay) for stage in stages} == {(2048, 0.03, 0.0)}
    everything = {"vision_tower", "mm_projector", "llm"}
    assert [set(stage.trainable) for stage in stages] == [
        {"mm_projector"},
        {"vision_tower", "mm_projector"},
        {"mm_projector", "llm"},
        everything,
        everything,
    ]


def test_the_reference_repositorys_values_differ_where_its_scripts_do() -> None:
    """The named alternative must not silently become a copy of the paper's."""
    stages = _recipe("nvila-8b-reference").train.stages
    assert [stage.batch for stage in stages] == [512, 1024, 1024, 1024, 2048]
    assert [stage.learning_rate for stage in stages] == [1e-3, 2e-5, 2e-5, 1.5e-5, 2e-5]
    assert [stage.clip_norm for stage in stages] == [None, 5.0, None, 5.0, None]


@pytest.mark.parametrize(
    ("name", "mode", "projector"),
    [
        ("nvila-8b", "dynamic_s2", "mlp_downsample"),
        ("nvila-lite-8b", "dynamic", "mlp_downsample_3x3_fix"),
        ("nvila-8b-video", "resize", "mlp_downsample_2x2_fix"),
    ],
)
def test_variants_have_their_vision_mode_and_projector(name: str, mode: str, projector: str) -> None:
    """Lite is 3x3 and dynamic tiling, the others 2x2 and Dynamic-S2; confusing them changes every shape."""
    model = _recipe(name).model
    assert (model.vision_mode, model.projector) == (mode, projector)
