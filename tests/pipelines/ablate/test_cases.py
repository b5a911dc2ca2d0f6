"""Which cases there are, and how long each is trained."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nvila.components.contracts.errors import ConfigError
from nvila.components.contracts.recipe.train import Stage
from nvila.pipelines.ablate.case import at_ratio, rows_of
from nvila.pipelines.ablate.cases import ALL, Case, Design
from nvila.pipelines.ablate.passes import steps_of

SIZES = {"shapes.sft": 7975, "digits.sft": 6000, "shapes.captions": 2000}
STAGE = Stage(
    name="four",
    trainable=["llm"],
    learning_rate=1e-3,
    data={"shapes.sft": 2, "digits.sft": 1, "shapes.captions": 0.25},
    pruned=True,
    batch=32,
)


def test_identical_runs_are_trained_once() -> None:
    """At the largest ratio both schedules are the same training: done twice, a seventh of the budget would be lost."""
    design = Design(spoilt=False)
    assert len(list(design.rows())) == 2 * 3 * (1 + 4 * 3)
    assert len(design.runs()) == 3 * (2 + 4 * (1 + 2 + 2))
    assert design.run_of(Case(False, "random", 0.5, "epoch", 1)) == design.run_of(
        Case(False, "random", 0.5, "steps", 1)
    )


def test_the_spoilt_experiment_is_made_at_the_largest_ratio_alone() -> None:
    """What it has to tell is told there; at every ratio it would not fit the budget."""
    spoilt = [case for case in Design().runs() if case.spoilt]
    assert len(spoilt) == 3 * (2 + 4) and {case.ratio for case in spoilt if case.method != ALL} == {0.5}


@pytest.mark.parametrize(
    "wrong", [{"methods": ("delta",)}, {"ratios": (0.5, 1.0)}, {"seeds": 0}, {"methods": ()}, {"ratios": ()}]
)
def test_what_cannot_be_compared_is_refused(wrong: dict[str, object]) -> None:
    """A slip would show after an hour of training, or as an empty table."""
    with pytest.raises(ConfigError, match="not something to compare"):
        Design(**wrong)  # type: ignore[arg-type]


@given(st.sampled_from([0.9, 0.5, 0.3, 0.1, 0.02]))
def test_equal_steps_are_equal_to_the_last_one(ratio: float) -> None:
    """A subset that is passed over more often is rounded to whole samples more often; one step more is another case."""
    half, kept = at_ratio(SIZES, 0.5), at_ratio(SIZES, ratio)
    wanted = rows_of({"four": STAGE}, "steps", SIZES, half, half)["four"]
    row = rows_of({"four": STAGE}, "steps", SIZES, kept, half)["four"]
    assert steps_of(row, kept) == steps_of(wanted, half)
    share = row.data["shapes.captions"] * SIZES["shapes.captions"] / (steps_of(row, kept) * STAGE.batch)
    whole = 0.25 * 2000 / (2 * 7975 + 6000 + 0.25 * 2000)
    assert share == pytest.approx(whole, rel=0.01), "captions must weigh as much as in the recipe"


@pytest.mark.parametrize("ratio", [1.0, 0.5, 0.3, 0.1])
def test_one_epoch_is_the_recipes_passes_over_what_stays(ratio: float) -> None:
    """As in the paper; captions that did not shrink along would fill the training of a small subset."""
    row = rows_of({"four": STAGE}, "epoch", SIZES, at_ratio(SIZES, ratio), at_ratio(SIZES, 0.5))["four"]
    assert (row.data["shapes.sft"], row.data["digits.sft"]) == (2, 1)
    assert row.data["shapes.captions"] == pytest.approx(0.25 * ratio, rel=0.01)
