"""Results as steps tell them, for tests of those who read them."""

from __future__ import annotations

from typing import Any

from nvila.components.contracts.results.accuracy import Baseline, Evaluation, QuantizedEvaluation, Retained, Scored
from nvila.components.contracts.results.model import Judged, PrunedSource, Quantization, Training, Validation
from nvila.components.contracts.results.result import Measured, SkippedRecords

NONE_SKIPPED = SkippedRecords(records=0, first=[])


def measured(value: float, half: float = 0.02, n: int = 1000) -> Measured:
    """An accuracy with so wide an interval on either side."""
    return Measured(metric="accuracy", value=value, low=value - half, high=value + half, n=n)


def scored(value: float, half: float = 0.02, *, blind: float = 0.3, majority: float = 0.1, n: int = 1000) -> Scored:
    """The full model on a source whose strongest baseline reaches `blind`."""
    only = measured(blind, n=n).model_dump()
    return Scored(
        **measured(value, half, n).model_dump(),
        majority=measured(majority, n=n),
        question_only=Baseline(kind="blank picture", **only),
        baselines={"blank picture": Measured(**only)},
    )


def retained(value: float, full: float | None = None, *, noise: float = 0.0, n: int = 1000) -> Retained:
    """The quantized model; the full one answered `full` of the same questions right, by default as many."""
    before = measured(value if full is None else full, n=n)
    return Retained(**measured(value, n=n).model_dump(), full=before, fall=before.value - value, fall_noise=noise)


def evaluation(accuracy: dict[str, Scored], stages: dict[str, dict[str, float]] | None = None) -> Evaluation:
    """Of `evaluate`."""
    told = {step: {source: measured(v) for source, v in values.items()} for step, values in (stages or {}).items()}
    return Evaluation(accuracy=accuracy, stages=told)


def quantized_evaluation(accuracy: dict[str, Retained], max_new_tokens: int = 8) -> QuantizedEvaluation:
    """Of `evaluate-quantized`."""
    return QuantizedEvaluation(accuracy=accuracy, same_answer=1.0, through="torch", max_new_tokens=max_new_tokens)


def training(**told: Any) -> Training:
    """Of a training stage."""
    usual = {"stage": {"name": "align"}, "precision": "fp32", "steps": 400, "samples": 3200, "final_loss": 0.5}
    return Training(**usual | {"skipped": NONE_SKIPPED} | told)


def quantization(**told: Any) -> Quantization:
    """Of `quantize`."""
    usual = {"bytes_before": 400, "bytes_after": 170, "linears": {"W4A16": 21}, "method": "gptq", "group_size": 128}
    return Quantization(**usual | {"calibration_samples": 128, "skipped": NONE_SKIPPED} | told)


def validation(records: dict[str, dict[str, int]], quarantined: dict[str, int]) -> Validation:
    """Of `validate`."""
    return Validation(records=records, quarantined=quarantined, media_files=1, media_digest="d" * 64)


def pruned(**told: Any) -> PrunedSource:
    """One source of `prune`."""
    usual: dict[str, Any] = {"n": 800, "kept": 400, "composition": {}, "categories": {}, "examples": {}}
    return PrunedSource(**usual | told)


def judged(**told: Any) -> Judged:
    """The references on questions of one kind, where they can be believed."""
    usual: dict[str, Any] = {
        "n": 200,
        "loss": {"small": 2.15, "large": 0.09, "blank": 2.2, "question_only": 1.9},
        "accuracy": {"small": 0.21, "large": 0.97},
        "against": {"small": 1.9, "blank": 1.95, "question_only": 1.6},
        "trusted": True,
        "why": "",
    }
    return Judged(**usual | told)
