"""What may be said of a measured model: learnt, not above its baseline, lost by quantization.

The one rule behind every headline: the terminal's, the report's, the model card's and the webhook's. What a gate lets
pass is the recipe's affair (it may ask for nothing); this is not.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from nvila.components.contracts.metrics import in_words
from nvila.components.contracts.recipe.quantize import QuantizeGate
from nvila.components.contracts.results.accuracy import (
    Base,
    Baseline,
    Evaluation,
    QuantizedEvaluation,
    Retained,
    Scored,
)
from nvila.components.contracts.results.result import Measured, Result

Standing = Literal[
    "learnt",
    "not above its baseline",
    "below what it started from",
    "lost by quantization",
    "not above its baseline after quantization",
    "not measured after quantization",
]
LARGEST_LOSS = QuantizeGate().max_loss


class Compared(Result):
    """What is told of a source wherever values are told: the model before and after quantization, and its baselines."""

    full: Measured
    quantized: Measured | None
    """None where the run did not come that far."""
    majority: Measured
    question_only: Baseline
    base: Base | None = None
    """The model that training started from, where that was a whole one."""


@dataclass(frozen=True)
class Headline:
    """What to say of all sources together; `good` where nothing is to be said against the model."""

    good: bool
    text: str


def compared(full: Evaluation | None, quantized: QuantizedEvaluation | None) -> dict[str, Compared]:
    """By source; empty where nothing was measured."""
    after: Mapping[str, Measured] = quantized.accuracy if quantized else {}
    return {
        source: Compared(
            full=m, quantized=after.get(source), majority=m.majority, question_only=m.question_only, base=m.base
        )
        for source, m in (full.accuracy if full else {}).items()
    }


def what_was_measured(compared: Iterable[Compared]) -> str:
    """The metrics of the sources, in words that begin a sentence."""
    words = in_words(m.full.metric for m in compared)
    return words[:1].upper() + words[1:]


def above(measured: Measured, baseline: Measured) -> bool:
    """Whether the 95% interval of a model lies above that of a baseline."""
    return measured.low > baseline.high


def standing(full: Scored, quantized: Retained | None) -> Standing:
    """What may be said of one source."""
    if not above(full, full.question_only):
        return "not above its baseline"
    if full.base and full.base.fall_low > 0:
        return "below what it started from"
    if quantized is None:
        return "not measured after quantization"
    if -change(quantized) > LARGEST_LOSS:
        return "lost by quantization"
    return "learnt" if above(quantized, full.question_only) else "not above its baseline after quantization"


def change(quantized: Retained) -> float:
    """What quantization did to the value, on the questions that both models answered; a loss is negative."""
    return round(quantized.value - quantized.full.value, 4)


def headline(full: Evaluation | None, quantized: QuantizedEvaluation | None) -> Headline:
    """What may be said of the whole model, as far as its run came."""
    if full is None:
        return Headline(False, "not measured")
    after = quantized.accuracy if quantized else {}
    found: dict[Standing, list[str]] = {}
    for source, measured in full.accuracy.items():
        found.setdefault(standing(measured, after.get(source)), []).append(source)
    if list(found) == ["learnt"]:
        return Headline(True, "learnt: every source is above its baseline, after quantization too")
    against = [f"{what}: {', '.join(sources)}" for what, sources in found.items() if what != "learnt"]
    return Headline(False, "; ".join(against))
