"""What preprocessing, video sampling and the model's parts cost beside the plain way; results are compared first.

The rows lie in `model_rows`, one file per subject.
"""

from __future__ import annotations

import torch
from model_rows import compression, generation, parts, preprocessing, videos
from model_rows.measure import Measured


def rows() -> list[Measured]:
    """Work, unit, baseline, ours, what the baseline is, and how many times better ours has to be."""
    torch.set_num_threads(1)
    with torch.no_grad():
        subjects = (preprocessing, videos, parts, generation, compression)
        return [row for subject in subjects for row in subject.rows()]
