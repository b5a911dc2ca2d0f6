"""Which ways of training do not go together: one table, each with its reason, for the schema and for who prints it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from nvila.components.contracts.precisions import PRECISIONS
from nvila.components.contracts.recipe.section import Disagreement

if TYPE_CHECKING:
    from nvila.components.contracts.recipe.train import Run, Stage


@dataclass(frozen=True)
class RunRule:
    """What no stage of a run can be."""

    option: str
    """The one that is best changed, dotted, from `train` on."""
    refused: Callable[[Run], bool]
    why: str
    """In words, with the values of the run."""


@dataclass(frozen=True)
class StageRule:
    """What a stage cannot be in a run."""

    option: str
    """The one that is best changed, dotted, from the stage's row on."""
    refused: Callable[[Run, Stage], bool]
    why: str
    """In words, with the values of run and stage."""


RUN_RULES = (
    RunRule(
        "offload",
        lambda run: run.offload != "none" and run.zero < 2,
        "offload: {run.offload} needs zero: 2 or 3, not {run.zero}",
    ),
    RunRule(
        "packing",
        lambda run: run.loss_weighting == "device_batch" and run.packing not in ("auto", "padded"),
        "loss_weighting: device_batch keeps micro batches as they are: {run.packing} would have no effect",
    ),
    RunRule(
        "fp8.scaling",
        lambda run: run.fp8.scaling == "rowwise" and run.precision in ("fp8-delayed", "fp8-block"),
        "rowwise would have no effect: {run.precision} has a scaling of its own",
    ),
)
STAGE_RULES = (
    StageRule(
        "methods.llm",
        lambda run, stage: PRECISIONS[run.precision].fp8 and "qlora" in stage.methods.values(),
        "under qlora the decoder's weights lie in four bits, and none is left that {run.precision} could multiply in"
        " FP8: say lora, or train.precision: bf16",
    ),
)


def refusals(run: Run, stages: list[Stage | None]) -> Iterator[Disagreement]:
    """What the tables say against a run of these stages."""
    for rule in RUN_RULES:
        if rule.refused(run):
            yield Disagreement(rule.option, rule.why.format(run=run))
    for index, stage in enumerate(stages):
        for each in STAGE_RULES:
            if stage and each.refused(run, stage):
                yield Disagreement(f"stages.{index}.{each.option}", each.why.format(run=run, stage=stage))
