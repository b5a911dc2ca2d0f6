"""The job: everything a training process reads, as one JSON file, so that any launcher can start it."""

from __future__ import annotations

from nvila.components.contracts.recipe.section import Section
from nvila.components.contracts.recipe.train import Run, Stage

FP8 = "fp8.json"
"""What an FP8 precision was in this stage: `results.model.Fp8Products`."""
TRAINED = ("model/**/*", "adapter/**/*", "loss.jsonl", "skipped.jsonl", FP8)
"""Files of a trained stage."""
RECORD = "trained.json"
"""Their sizes and digests; without it they are not believed."""


class Job(Section):
    """One stage on given data."""

    stage: Stage
    run: Run
    seed: int
    model: str
    """Folder of the native checkpoint to start from."""
    base: str = ""
    """Digest of that model: a checkpoint of the stage holds what is trained, and goes with no other."""
    samples: str
    """The sample table."""
    kept: list[str] = []
    """Score tables of DeltaLoss; with `stage.pruned` only their kept SFT samples are drawn."""
    out: str
    """The step's folder: checkpoints, `loss.jsonl`, and at the end `model/`, with adapters beside it."""
