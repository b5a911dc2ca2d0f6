"""What may be said of a measured model: learnt, not above its baseline, lost by quantization.

The one rule behind every headline: the terminal's, the report's, the model card's and the webhook's. What a gate lets
pass is the recipe's affair (it may ask for nothing); this is not.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from nvila.components.contracts.recipe.quantize import QuantizeGate

Measured = Mapping[str, Any]
"""`accuracy`, `low`, `high` of a source; for the full model also `question_only`, for the quantized one `full`: what
the full model reached on the questions that both were asked."""
Standing = Literal[
    "learnt",
    "not above its baseline",
    "lost by quantization",
    "not above its baseline after quantization",
    "not measured after quantization",
]
LARGEST_LOSS = QuantizeGate().max_loss


@dataclass(frozen=True)
class Headline:
    """What to say of all sources together; `good` where nothing is to be said against the model."""

    good: bool
    text: str


def number(measured: Measured, name: str) -> float:
    """A measured number; NaN, with which every comparison fails, where it is missing, null, infinite or none at all."""
    value = measured.get(name)
    return value if isinstance(value, (int, float)) and math.isfinite(value) else math.nan


def above(measured: Measured, baseline: Measured) -> bool:
    """Whether the 95% interval of a model lies above that of a baseline; False where a number is missing."""
    return number(measured, "low") > number(baseline, "high")


def standing(full: Measured, quantized: Measured | None) -> Standing:
    """What may be said of one source."""
    baseline = full.get("question_only") or {}
    if not above(full, baseline):
        return "not above its baseline"
    if not quantized:
        return "not measured after quantization"
    if not -change(full, quantized) <= LARGEST_LOSS:
        return "lost by quantization"
    return "learnt" if above(quantized, baseline) else "not above its baseline after quantization"


def change(full: Measured, quantized: Measured) -> float:
    """What quantization did to exact match, on the questions that both models answered; a loss is negative."""
    before = number(quantized if "full" in quantized else full, "full" if "full" in quantized else "accuracy")
    return round(number(quantized, "accuracy") - before, 4)


def headline(full: Mapping[str, Measured], quantized: Mapping[str, Measured]) -> Headline:
    """What may be said of the whole model.

    Args:
        full: `accuracy` of the step `evaluate`, by source.
        quantized: that of `evaluate-quantized`; empty where the run did not come that far.
    """
    if not full:
        return Headline(False, "not measured")
    found: dict[Standing, list[str]] = {}
    for source, measured in full.items():
        found.setdefault(standing(measured, quantized.get(source)), []).append(source)
    if list(found) == ["learnt"]:
        return Headline(True, "learnt: every source is above its baseline, after quantization too")
    against = [f"{what}: {', '.join(sources)}" for what, sources in found.items() if what != "learnt"]
    return Headline(False, "; ".join(against))
