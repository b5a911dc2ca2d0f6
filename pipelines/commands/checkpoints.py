"""`nvila convert` and `nvila inspect`: checkpoints from anywhere, described or brought into another layout."""

from __future__ import annotations

from pathlib import Path

from nvila.components.contracts.environment import before_importing
from nvila.components.contracts.manifest import written_by


def convert(source: str, target: Path, layout: str, dtype: str | None) -> str:
    """Convert the checkpoint at a path, `s3://` or `hf://id@revision`; returns what was made as one line.

    Raises:
        ConfigError: no such layout, or `target` exists.
        DataError: the source cannot be fetched or is broken.
        DamagedError: a step wrote the source, and it was changed since.
    """
    before_importing("transformers")

    from nvila.components.data.fetch import fetch
    from nvila.components.model.checkpoint.convert import convert as run

    folder = fetch(source)
    written_by(folder)
    made = run(folder, target, layout, dtype=dtype)
    return f"{made.folder}: {made.source} to {layout}, {made.tensors} tensors, {made.bytes / 1e9:.2f} GB"


def inspect(source: str) -> str:
    """What the checkpoint at a path, `s3://` or `hf://id@revision` is, as lines for a terminal.

    Raises:
        ConfigError: not what this model computes.
        DataError: it cannot be fetched or is broken.
        DamagedError: a step wrote it, and it was changed since.
    """
    from nvila.components.data.fetch import fetch
    from nvila.components.model.checkpoint.describe import describe, render

    folder = fetch(source)
    written_by(folder)
    return render(describe(folder))
