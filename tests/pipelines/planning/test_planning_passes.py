"""What a plan says of how samples will share passes."""

from __future__ import annotations

import pytest
from memory_measured import CONFIG

from nvila.components.contracts.recipe.train import Run, Stage
from nvila.components.model.shape import count
from nvila.pipelines.planning.cost import Subset
from nvila.pipelines.planning.passes import passes

STAGE = Stage(name="x", trainable=["llm"], learning_rate=1e-3, data={"a.sft": 1}, batch=64)
NARROW, WIDE = ((20.0, 30.0), tuple(float(n) for n in range(0, 900, 30)))


@pytest.mark.parametrize(
    ("texts", "precision", "packing", "gpu", "said"),
    [
        (NARROW, "bf16", "auto", False, "padded: rows of one sample, in their order"),
        (WIDE, "bf16", "auto", False, "grouped: rows of one sample, those of like length together (padded would cost"),
        (WIDE, "bf16", "auto", True, "packed: one row of several samples, by a kernel"),
        (WIDE, "fp32", "packed", True, "packed: rows of several samples"),
    ],
)
def test_a_plan_says_which_and_why(
    texts: tuple[float, ...], precision: str, packing: str, gpu: bool, said: str
) -> None:
    """Whoever pays for a stage learns of the wrong arrangement by its bill."""
    known = {"a.sft": Subset(1000, sum(texts) / len(texts), "image", texts)}
    run = Run.model_validate({"precision": precision, "packing": packing})
    assert passes(count(CONFIG), STAGE, run, {"a.sft": 1000}, known, gpu=gpu).startswith(said)
