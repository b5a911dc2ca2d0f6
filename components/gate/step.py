"""Steps `gate` and `gate-quantized`: whether a measured model may go on. A refusal ends the run with exit code 3."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from nvila.components.contracts.errors import Rejected
from nvila.components.contracts.manifest import Manifest
from nvila.components.contracts.recipe.evaluate import Gate
from nvila.components.contracts.recipe.quantize import QuantizeGate
from nvila.components.contracts.recipe.section import Section
from nvila.components.contracts.results.accuracy import Evaluation, Passed, QuantizedEvaluation
from nvila.components.contracts.results.result import Measured
from nvila.components.contracts.step import Outcome
from nvila.components.metrics.gates import objections, objections_to_quantized


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
    metrics, gate = inputs["metrics"], settings.gate
    measured: Mapping[str, Measured]
    if isinstance(gate, QuantizeGate):
        measured = small = metrics.told(QuantizedEvaluation).accuracy
        reasons = objections_to_quantized(gate, small)
    else:
        measured = full = metrics.told(Evaluation).accuracy
        reasons = objections(gate, full)
    if reasons:
        raise Rejected(
            "the gate refuses the model: " + "; ".join(reasons),
            do="Everything is kept; see the report. Train longer, or change the gate in the recipe.",
        )
    return Outcome(kind="metrics", result=Passed(sources=sorted(measured)))
