"""What training takes on one NVIDIA GPU: `make bench-gpu`. The rows lie in `gpu_rows`, one file per subject.

Where there is no GPU there are no rows.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from gpu_rows import fp8, packing, tuning, utilization

Row = tuple[str, str, float, float, str, float | None]


def rows() -> Iterator[Row]:
    """Work, unit, baseline, ours, what the baseline is, and how many times better ours has to be."""
    for subject in (utilization, packing, fp8, tuning) if torch.cuda.is_available() else ():
        yield from subject.rows()
        torch.cuda.empty_cache()
