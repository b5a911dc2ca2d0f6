"""What the two gates ask of measured numbers. The steps refuse by it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nvila.components.contracts.recipe.evaluate import Gate
from nvila.components.contracts.recipe.quantize import QuantizeGate
from nvila.components.metrics.standing import above, number


def objections(gate: Gate | QuantizeGate, measured: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Why the gate would refuse; empty when it would not.

    Every condition has to hold: a number that is not there, or is none (null, NaN), holds nothing.

    Args:
        gate: of the evaluation, or of the quantization.
        measured: per source `accuracy`, `low`, `high`, `n`, and `question_only` or `fall` and `fall_noise`.
    """
    if not measured:
        return ["no source was measured"]
    few = [
        f"{source}: {m.get('n', 0)} questions are too few to tell; the gate asks for {gate.least_questions}"
        for source, m in measured.items()
        if not number(m, "n") >= gate.least_questions
    ]
    return few + (_lost(gate, measured) if isinstance(gate, QuantizeGate) else _missed(gate, measured))


def _lost(gate: QuantizeGate, measured: Mapping[str, Mapping[str, Any]]) -> list[str]:
    reasons = []
    for source, m in measured.items():
        seen = number(m, "fall")
        worst = seen + number(m, "fall_noise")
        if not worst <= gate.max_loss:
            reasons.append(
                f"{source}: exact match fell by {seen:.3f}, in truth perhaps by {worst:.3f} (95% interval), more than "
                f"{gate.max_loss}"
            )
    return reasons


def _missed(gate: Gate, measured: Mapping[str, Mapping[str, Any]]) -> list[str]:
    reasons = [
        f"{source}: exact match {number(measured[source], 'accuracy'):.3f} is below {least}"
        if source in measured
        else f"{source}: was not measured, and {least} is asked"
        for source, least in gate.min_accuracy.items()
        if not number(measured.get(source, {}), "accuracy") >= least
    ]
    if gate.above_question_only:
        for source, m in measured.items():
            baseline = m.get("question_only") or {}
            if not above(m, baseline):
                reasons.append(
                    f"{source}: exact match {number(m, 'accuracy'):.3f} (95% from {number(m, 'low'):.3f}) is not above "
                    f"the question-only baseline {number(baseline, 'accuracy'):.3f} "
                    f"(95% to {number(baseline, 'high'):.3f})"
                )
    return reasons
