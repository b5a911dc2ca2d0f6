"""What the two gates ask of measured values. The steps refuse by it."""

from __future__ import annotations

from collections.abc import Mapping

from nvila.components.contracts.metrics import in_words
from nvila.components.contracts.recipe.evaluate import Gate
from nvila.components.contracts.recipe.quantize import QuantizeGate
from nvila.components.contracts.results.accuracy import Retained, Scored
from nvila.components.metrics.standing import above


def objections(gate: Gate, measured: Mapping[str, Scored]) -> list[str]:
    """Why the gate of the evaluation would refuse; empty when it would not. Every condition has to hold."""
    reasons = _few(gate.least_questions, measured)
    for source, least in gate.min_accuracy.items():
        if source not in measured:
            reasons.append(f"{source}: was not measured, and {least} is asked")
        elif measured[source].value < least:
            m = measured[source]
            reasons.append(f"{source}: {in_words([m.metric])} {m.value:.3f} is below {least}")
    for source, m in measured.items() if gate.above_question_only else ():
        if not above(m, m.question_only):
            reasons.append(
                f"{source}: {in_words([m.metric])} {m.value:.3f} (95% from {m.low:.3f}) is not above the question-only "
                f"baseline {m.question_only.value:.3f} (95% to {m.question_only.high:.3f})"
            )
    return reasons + _since_the_base(gate, measured)


def _since_the_base(gate: Gate, measured: Mapping[str, Scored]) -> list[str]:
    """What the model has lost of the one that it was fine-tuned from."""
    reasons = []
    for source in dict.fromkeys((*(gate.not_below_base or ()), *gate.max_forgotten)):
        base = measured[source].base if source in measured else None
        if base is None:
            reasons.append(f"{source}: the model that training started from was not measured")
            continue
        most, what = gate.max_forgotten.get(source), f"{source}: {in_words([base.metric])} fell from {base.value:.3f}"
        ends = f"by {base.fall:.3f} (95% from {base.fall_low:.3f} to {base.fall_high:.3f})"
        if source in (gate.not_below_base or ()) and base.fall_low > 0:
            reasons.append(f"{what} {ends} since training started")
        if most is not None and base.fall_high > most:
            reasons.append(f"{what} {ends}, in truth perhaps by more than {most} (max_forgotten)")
    return reasons


def objections_to_quantized(gate: QuantizeGate, measured: Mapping[str, Retained]) -> list[str]:
    """Why the gate of the quantization would refuse."""
    return _few(gate.least_questions, measured) + [
        f"{source}: {in_words([m.metric])} fell by {m.fall:.3f}, in truth perhaps by {m.fall + m.fall_noise:.3f} (95% "
        f"interval), more than {gate.max_loss}"
        for source, m in measured.items()
        if m.fall + m.fall_noise > gate.max_loss
    ]


def _few(least: int, measured: Mapping[str, Scored] | Mapping[str, Retained]) -> list[str]:
    if not measured:
        return ["no source was measured"]
    return [
        f"{source}: {m.n} questions are too few to tell; the gate asks for {least}"
        for source, m in measured.items()
        if m.n < least
    ]
