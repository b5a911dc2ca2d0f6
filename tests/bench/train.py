"""What training costs beside the plain way. The rows lie in `train_rows`, one file per subject."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

HERE = Path(__file__).with_name("train_rows")
Row = tuple[str, str, float, float, str, float | None]


def rows() -> Iterator[Row]:
    """Work, unit, baseline, ours, what the baseline is, and how many times better ours has to be."""
    for path in sorted(HERE.glob("*.py")):
        subject = import_module(f"{HERE.name}.{path.stem}")
        if hasattr(subject, "rows"):
            yield from subject.rows()
