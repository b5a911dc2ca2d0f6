"""Recipe section `evaluate`: what is measured, and what the gate asks."""

from __future__ import annotations

from collections.abc import Iterator

from pydantic import Field

from nvila.components.contracts.metrics import Metric
from nvila.components.contracts.recipe.section import MOST_ENTRIES, Disagreement, Name, Questions, Section, Share

LEAST_QUESTIONS = 30
"""With fewer questions an interval is wider than anything that a gate would ask."""


class Gate(Section):
    """What a model must reach to go on; exit code 3 where it does not."""

    min_accuracy: dict[Name, Share] = Field(default={}, max_length=MOST_ENTRIES)
    """Least value per source, in its metric."""
    above_question_only: bool = True
    """Each source's 95% interval must lie above that of its strongest question-only baseline."""
    least_questions: Questions = LEAST_QUESTIONS
    """A source with fewer held-out questions is refused."""
    not_below_base: list[Name] | None = Field(default=None, max_length=MOST_ENTRIES)
    """Fine-tuning: sources on which the model may not have become worse than the one it started from: the 95% interval
    of the change, question by question, must not lie below 0. null: those that its stages draw."""
    max_forgotten: dict[Name, Share] = Field(default={}, max_length=MOST_ENTRIES)
    """Fine-tuning: how far it may have fallen on other sources, by source: the 95% interval of the fall must end there
    or below."""

    @property
    def open(self) -> bool:
        """Whether every model passes that has been asked enough."""
        held = self.above_question_only or any(self.min_accuracy.values())
        return not held and not self.not_below_base and not self.max_forgotten


class Tasks(Section):
    """What is asked: the questions of the held-out splits, each source a benchmark."""

    sources: list[Name] = Field(min_length=1, max_length=MOST_ENTRIES)
    """Names of those whose held-out questions are asked."""
    metrics: dict[Name, Metric] = Field(default={}, max_length=MOST_ENTRIES)
    """By which metric a source's answers are scored; `accuracy` (exact match) where none is given."""
    limit: Questions | None = None
    """Held-out questions per source for the final model; None is all of them."""
    stage_limit: Questions = 500
    """Held-out questions per source for the model before training and after each stage."""
    batch: int = Field(default=64, ge=1, le=65_536)
    """Questions that are answered at once."""
    max_new_tokens: int = Field(default=8, ge=1, le=32_768)
    """Longest answer."""

    def metric(self, source: str) -> Metric:
        """Of a source."""
        return self.metrics.get(source, "accuracy")


class EvaluateSettings(Tasks):
    """The questions, and what their answers must reach."""

    gate: Gate = Gate()
    """What their answers must reach."""

    @property
    def tasks(self) -> Tasks:
        """The questions alone."""
        return self.part(Tasks)

    def disagreements(self) -> Iterator[Disagreement]:
        """Each source is asked once, and often enough for the gate."""
        if len(set(self.sources)) != len(self.sources):
            yield Disagreement("sources", "a source stands there twice")
        if self.limit and self.limit < self.gate.least_questions:
            why = f"the gate refuses sources with fewer than {self.gate.least_questions} questions (least_questions)"
            yield Disagreement("limit", why, self.limit)
