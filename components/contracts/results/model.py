"""What the steps tell that make a model or choose its data."""

from __future__ import annotations

from typing import Any

from nvila.components.contracts.results.result import Result, SkippedRecords


class Validation(Result):
    """Of `validate`."""

    records: dict[str, dict[str, int]]
    """Good ones, by source and split."""
    quarantined: dict[str, int]
    """Spoilt ones, by reason."""
    media_files: int
    media_digest: str
    """Over the names and digests of all media, wherever they lie."""


class Initialization(Result):
    """Of the step that makes the model which stage 1 starts from."""

    parameters: dict[str, int]
    """By part of the model."""
    weights: dict[str, dict[str, str]] | None = None
    """What was fetched, by part; None of a model made from nothing, which alone has what follows."""
    vocabulary: int | None = None
    label_pictures: int | None = None
    labels: int | None = None
    skipped: SkippedRecords | None = None
    tower_label_accuracy: float | None = None
    tower_steps: int | None = None


class PrunedSource(Result):
    """How pruning parted one source."""

    n: int
    kept: int
    accuracy_small: float
    """Of the small reference model, on held-out questions."""
    accuracy_large: float
    informative: bool
    """Whether the scores mean anything: the large reference model is the better one."""
    mean_delta: float


class Pruning(Result):
    """Of `prune`."""

    sources: dict[str, PrunedSource]
    score: str | None = None
    skipped: SkippedRecords = SkippedRecords()


class Training(Result):
    """Of a training stage."""

    stage: dict[str, Any]
    """The row of the stage table, as the recipe had it."""

    @property
    def name(self) -> str:
        """The stage's name."""
        return str(self.stage.get("name", ""))

    precision: str
    steps: int
    """Of the optimizer."""
    samples: int
    skipped: SkippedRecords
    final_loss: float | None
    """Mean over the last tenth; None where no step had a usable sample."""


class Quantization(Result):
    """Of `quantize`."""

    bytes_before: int
    """Of the same tensors in bf16."""
    bytes_after: int
    linears: dict[str, int]
    """How many Linears each scheme has."""
    method: str
    group_size: int
    calibration_samples: int
    skipped: SkippedRecords
