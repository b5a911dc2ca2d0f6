"""Steps `gate` and `gate-quantized`: whether a measured model may go on. A refusal ends the run with exit code 3."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nvila.components.contracts.errors import Rejected
from nvila.components.contracts.manifest import Manifest
from nvila.components.contracts.recipe.evaluate import Gate
from nvila.components.contracts.recipe.quantize import QuantizeGate
from nvila.components.contracts.recipe.section import Section
from nvila.components.contracts.step import Outcome
from nvila.components.metrics.standing import above


class Settings(Section):
    """Slice of a gate."""

    gate: Gate | QuantizeGate


def run(settings: Settings, inputs: Mapping[str, Manifest], out: Path) -> Outcome:
    """Let the model pass, or refuse it with every reason.

    Args:
        settings: what is asked.
        inputs: `metrics`, the manifest of the evaluation before the gate.
        out: gets nothing but the manifest.

    Raises:
        Rejected: the model misses what the gate asks.
    """
    measured = inputs["metrics"].values["accuracy"]
    reasons = objections(settings.gate, measured)
    if reasons:
        raise Rejected(
            "the gate refuses the model: " + "; ".join(reasons),
            do="Everything is kept; see the report. Train longer, or change the gate in the recipe.",
        )
    return Outcome(kind="metrics", values={"passed": True, "sources": sorted(measured)})


def objections(gate: Gate | QuantizeGate, measured: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Why the gate would refuse; empty when it would not.

    Every condition has to hold: a number that is not there, or is none (NaN), holds nothing.

    Args:
        gate: of the evaluation, or of the quantization.
        measured: per source `accuracy`, `low`, `high`, `n`, and `question_only` or `fall` and `fall_noise`.
    """
    if not measured:
        return ["no source was measured"]
    few = [
        f"{source}: {m.get('n', 0)} questions are too few to tell; the gate asks for {gate.least_questions}"
        for source, m in measured.items()
        if not m.get("n", 0) >= gate.least_questions
    ]
    return few + (_lost(gate, measured) if isinstance(gate, QuantizeGate) else _missed(gate, measured))


def _lost(gate: QuantizeGate, measured: Mapping[str, Mapping[str, Any]]) -> list[str]:
    return [
        f"{source}: exact match fell by {m['fall']:.3f}, in truth perhaps by {m['fall'] + m['fall_noise']:.3f} "
        f"(95% interval), more than {gate.max_loss}"
        for source, m in measured.items()
        if not m["fall"] + m["fall_noise"] <= gate.max_loss
    ]


def _missed(gate: Gate, measured: Mapping[str, Mapping[str, Any]]) -> list[str]:
    reasons = [
        f"{source}: exact match {measured[source]['accuracy']:.3f} is below {least}"
        if source in measured
        else f"{source}: was not measured, and {least} is asked"
        for source, least in gate.min_accuracy.items()
        if source not in measured or not measured[source]["accuracy"] >= least
    ]
    if gate.above_question_only:
        reasons += [
            f"{source}: exact match {m['accuracy']:.3f} (95% from {m['low']:.3f}) is not above the question-only "
            f"baseline {m['question_only']['accuracy']:.3f} (95% to {m['question_only']['high']:.3f})"
            for source, m in measured.items()
            if not above(m, m["question_only"])
        ]
    return reasons
