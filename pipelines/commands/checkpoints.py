"""`nvila convert` and `nvila inspect`: checkpoints from anywhere, described or brought into another layout."""

from __future__ import annotations

from pathlib import Path

from nvila.components.contracts.environment import before_importing
from nvila.components.tracking.checkpoints import find_model


def convert(reference: str, target: Path, layout: str, dtype: str | None, runs: Path) -> str:
    """Convert a checkpoint; returns what was made as one line.

    Raises:
        ConfigError: no such layout, or `target` exists; further errors as of `find_model`.
        DataError: it is broken.
    """
    before_importing("transformers")

    from nvila.components.model.checkpoint.convert import convert as run

    made = run(find_model(reference, runs).folder, target, layout, dtype=dtype)
    return f"{made.folder}: {made.source} to {layout}, {made.tensors} tensors, {made.bytes / 1e9:.2f} GB"


def inspect(reference: str, runs: Path) -> str:
    """What a checkpoint is, as lines for a terminal.

    Raises:
        ConfigError: not what this model computes; further errors as of `find_model`.
        DataError: it is broken.
    """
    from nvila.components.model.checkpoint.describe import describe, render

    return render(describe(find_model(reference, runs).folder))
