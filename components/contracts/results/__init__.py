"""The result of each step: a frozen model of its own, which its manifest carries.

A new field needs a default, which is not written: so a manifest of an earlier version keeps its digest.
"""

from __future__ import annotations

from nvila.components.contracts.results.accuracy import Evaluation, Passed, QuantizedEvaluation
from nvila.components.contracts.results.model import Initialization, Pruning, Quantization, Training, Validation
from nvila.components.contracts.results.result import Other, Result
from nvila.components.contracts.results.run import Preflight, Registration, Resolution, Rollout

RESULTS: dict[str, type[Result]] = {
    "resolve": Resolution,
    "preflight": Preflight,
    "validate": Validation,
    "base": Initialization,
    "prune-image": Pruning,
    "prune-video": Pruning,
    "train-1": Training,
    "train-2": Training,
    "train-3": Training,
    "train-4": Training,
    "train-5": Training,
    "evaluate": Evaluation,
    "gate": Passed,
    "quantize": Quantization,
    "evaluate-quantized": QuantizedEvaluation,
    "gate-quantized": Passed,
    "register": Registration,
    "rollout": Rollout,
}


def result_type(step: str) -> type[Result]:
    """The type of a step's result."""
    return RESULTS.get(step, Other)
