"""What the evaluations and their gates tell, by source of questions."""

from __future__ import annotations

from typing import Literal

from nvila.components.contracts.results.result import Measured, Result


class Baseline(Measured):
    """What is reached without seeing the right picture."""

    kind: str


class Base(Measured):
    """The whole model that training started from, on the same questions."""

    fall: float
    """How far the value fell since, question by question; a gain is negative."""
    fall_low: float
    """With `fall_high` its 95% interval."""
    fall_high: float


class Scored(Measured):
    """The full model on one source, beside what needs no picture."""

    majority: Measured
    """The most common training answer to everything."""
    question_only: Baseline
    """The strongest of the baselines."""
    baselines: dict[str, Measured]
    base: Base | None = None
    """None of a model that was made by its run."""


class Retained(Measured):
    """The quantized model on one source."""

    full: Measured
    """The full model on the same questions."""
    fall: float
    """How far the value fell, question by question."""
    fall_noise: float
    """How much farther it may have fallen in truth: the sum of both is the upper end of a 95% interval."""


class Evaluation(Result):
    """Of `evaluate`."""

    accuracy: dict[str, Scored]
    stages: dict[str, dict[str, Measured]]
    """By step and source: the model after each of them, on the first questions."""


class QuantizedEvaluation(Result):
    """Of `evaluate-quantized`."""

    accuracy: dict[str, Retained]
    same_answer: float
    """Share of the questions that both models answer alike."""
    through: Literal["vllm", "torch"]
    max_new_tokens: int


class Passed(Result):
    """Of a gate: the model may go on."""

    sources: list[str]
