"""`nvila convert` and `nvila inspect`: checkpoints from anywhere, described or brought into another layout."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

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


def inspect(reference: str, runs: Path) -> tuple[dict[str, Any], str]:
    """What a checkpoint is, for programs and as lines for a terminal.

    Raises:
        ConfigError: not what this model computes; further errors as of `find_model`.
        DataError: it is broken.
    """
    from nvila.components.model.checkpoint.describe import describe, render

    model = find_model(reference, runs)
    described = describe(model.folder)
    found = {"name": model.name, "version": model.version, "folder": str(model.folder)}
    registered = f"{model.name} version {model.version} in {model.folder}\n\n" if model.version != "0" else ""
    return found | asdict(described), registered + render(described)
