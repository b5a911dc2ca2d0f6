"""The pipelines: tables over the same rows. A run is of one of them, which its recipe decides."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

from nvila.components.contracts.steps import INITIALIZE, PRUNES, STAGES, STEPS, Step

PipelineName = Literal["lifecycle", "finetune"]
MOST_TUNING = 3
"""Training steps of the pipeline that fine-tunes."""


@dataclass(frozen=True)
class Pipeline:
    """A table of steps, and the form that starts it."""

    name: PipelineName
    about: str
    """What it does, in a sentence; KFP's UI shows it."""
    steps: tuple[Step, ...]
    """In the order in which a person reads them: each step behind those that it waits for."""
    form: Mapping[str, Any]
    """The fields of its form (`recipe.form.Form`), in their order, with what each holds at first."""

    @cached_property
    def rows(self) -> dict[str, Step]:
        """By name."""
        return {row.name: row for row in self.steps}

    @cached_property
    def stages(self) -> tuple[str, ...]:
        """Names of the training steps."""
        return tuple(name for name in STAGES if name in self.rows)


def without(steps: Sequence[Step], names: Collection[str]) -> tuple[Step, ...]:
    """The table without these steps: whoever read one reads what goes on in its place.

    Raises:
        ValueError: a step cannot be left out, as nothing goes on in its place.
    """
    dropped = {row.name: row for row in steps if row.name in names}
    if needed := [name for name, row in dropped.items() if not row.hands_on]:
        raise ValueError(f"nothing goes on in the place of {', '.join(needed)}")

    def standing(name: str) -> str:
        return standing(dropped[name].inputs[dropped[name].hands_on]) if name in dropped else name

    return tuple(
        replace(
            row,
            inputs={name: standing(step) for name, step in row.inputs.items()},
            after=tuple(dict.fromkeys(map(standing, row.after))),
        )
        for row in steps
        if row.name not in dropped
    )


def _tuning() -> tuple[Step, ...]:
    """The lifecycle's steps without pruning and later stages, where a stage is one of fine-tuning."""
    told = {
        INITIALIZE: ("the model that is fine-tuned, taken over as it is", "the model to start from"),
        STAGES[0]: ("fine-tuning", "fine-tuning"),
        STAGES[1]: ("a second stage of fine-tuning, where the recipe has one", "fine-tuning, second stage"),
        STAGES[2]: ("a third stage of fine-tuning, where the recipe has one", "fine-tuning, third stage"),
    }
    rows = without(STEPS, (*PRUNES, *STAGES[MOST_TUNING:]))
    said = {row.name: told.get(row.name, (row.about, row.remark)) for row in rows}
    return tuple(replace(row, about=said[row.name][0], remark=said[row.name][1]) for row in rows)


_PLACES: dict[str, Any] = {"data_uri": "", "model_name": ""}
_REST: dict[str, Any] = {"target": "none", "overrides": {}}
PIPELINES: Mapping[PipelineName, Pipeline] = {
    made.name: made
    for made in (
        Pipeline(
            name="lifecycle",
            about="Validate, prune, train in stages, evaluate, quantize, register and roll out one NVILA.",
            steps=STEPS,
            form={"recipe": "tiny", **_PLACES, "keep_ratio": 0.0, **_REST},
        ),
        Pipeline(
            name="finetune",
            about="Fine-tune a registered or published NVILA, hold it against its base, quantize, register, roll out.",
            steps=_tuning(),
            form={"recipe": "tiny-finetune", "start_from": "", **_PLACES, **_REST},
        ),
    )
}


def pipeline_of(whole: bool) -> Pipeline:
    """That of a recipe, which starts from a `whole` model or makes its own."""
    return PIPELINES["finetune" if whole else "lifecycle"]
