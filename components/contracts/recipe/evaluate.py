"""Recipe section `evaluate`: what is measured, and what the gate asks."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from nvila.components.contracts.metrics import Metric
from nvila.components.contracts.recipe.section import Section

LEAST_QUESTIONS = 30
"""With fewer questions an interval is wider than anything that a gate would ask."""


class Gate(Section):
    """What a model must reach to go on; exit code 3 where it does not."""

    min_accuracy: dict[str, Annotated[float, Field(ge=0, le=1)]] = {}
    """Least value per source, in its metric."""
    above_question_only: bool = True
    """Each source's 95% interval must lie above that of its strongest question-only baseline."""
    least_questions: int = Field(default=LEAST_QUESTIONS, ge=1)
    """A source with fewer held-out questions is refused."""


class Tasks(Section):
    """What is asked: the questions of the held-out splits, each source a benchmark."""

    sources: list[str] = Field(min_length=1)
    metrics: dict[str, Metric] = {}
    """By which metric a source's answers are scored; `accuracy` (exact match) where none is given."""
    limit: int | None = Field(default=None, ge=1)
    """Held-out questions per source for the final model; None is all of them."""
    stage_limit: int = Field(default=500, ge=1)
    """Held-out questions per source for the model before training and after each stage."""
    batch: int = Field(default=64, ge=1)
    max_new_tokens: int = Field(default=8, ge=1)

    def metric(self, source: str) -> Metric:
        """Of a source."""
        return self.metrics.get(source, "accuracy")


class EvaluateSettings(Tasks):
    """The questions, and what their answers must reach."""

    gate: Gate = Gate()

    @property
    def tasks(self) -> Tasks:
        """The questions alone."""
        return self.part(Tasks)
