"""Pillow's bicubic resize of an RGB picture to several sizes: the same pixels to the bit, in less time.

Pillow weighs pixels in 22-bit fixed point, in one direction, then in the other, and rounds to 8 bits after each. The
same sums in float32 err by less than a known bound, so only sums that come closer than that to a half can be rounded
otherwise; these few are done again in integers. `preprocess` cuts the results into tiles.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import PIL
import torch
from PIL import Image
from torch.nn import functional as F

KNOWN = "13.0.0"
"""The Pillow whose order of the two directions is known here; any other one does the work itself."""
ONE = 1 << 22
"""The weight 1 in Pillow's fixed point for 8-bit channels."""
STRIP = 192
"""Values of each row in work at once, so that all rows of a strip stay near the processor."""
WORTHWHILE = 1_000_000
"""Pixels of all results together below which Pillow itself is as fast."""


def resize(image: Image.Image, sizes: Sequence[tuple[int, int]]) -> list[np.ndarray]:
    """(height, width, 3) uint8 arrays, each equal to `np.asarray(image.resize((width, height), BICUBIC))`.

    Args:
        image: an RGB picture.
        sizes: (width, height) of each result.
    """
    if not (_is_known() and _is_worthwhile(image.size, sizes)):
        return [np.asarray(image.resize(size, Image.Resampling.BICUBIC)) for size in sizes]
    turned = None
    made = []
    for width, height in sizes:
        if _height_first(image.size, (width, height)):
            made.append(_turned(_mixed(_turned(_mixed(np.asarray(image), height)), width)))
        else:
            turned = _turned(np.asarray(image)) if turned is None else turned
            made.append(_mixed(_turned(_mixed(turned, width)), height))
    return made


def _is_known() -> bool:
    return PIL.__version__ == KNOWN and torch.get_float32_matmul_precision() == "highest"


def _is_worthwhile(size: tuple[int, int], targets: Sequence[tuple[int, int]]) -> bool:
    """Whether there is more work in the results than in turning the picture, which also takes memory of its size."""
    pixels = sum(width * height for width, height in targets)
    return pixels >= max(WORTHWHILE, size[0] * size[1] // 2)


def _height_first(size: tuple[int, int], target: tuple[int, int]) -> bool:
    """Whether Pillow changes the height before the width: where that loses many more rows than columns."""
    (width, height), (to_width, to_height) = size, target
    return to_height < height and height - to_height > 2 * (width - to_width)


@dataclass(frozen=True)
class _Filter:
    """How N rows become M: each is a weighted sum of K neighbours."""

    index: np.ndarray
    """(M, K) int64: the rows that are summed."""
    fixed: np.ndarray
    """(M, K) int64: their weights in units of 1 / ONE, 0 where Pillow sums fewer."""
    bound: float
    """Largest error of a sum of pixels in float32."""
    bags: tuple[torch.Tensor, torch.Tensor, torch.Tensor]
    """The same for torch: rows (M * K,), where each sum starts (M,), float32 weights (M * K,), which are exact."""

    def sums(self, rows: torch.Tensor) -> np.ndarray:
        """(N, L) float32 to (M, L). On a CPU nothing in torch or numpy adds weighted rows faster than bags do."""
        index, starts, weights = self.bags
        return F.embedding_bag(index, rows, starts, mode="sum", per_sample_weights=weights).numpy()

    def exact(self, rows: np.ndarray, row: np.ndarray, column: np.ndarray) -> np.ndarray:
        """The values at (row, column) of the result of (N, L) uint8 rows, in Pillow's own arithmetic."""
        values = rows[self.index[row], column[:, None]]
        total = np.einsum("ik,ik->i", values, self.fixed[row], dtype=np.int64)
        return ((total + ONE // 2) // ONE).clip(0, 255)


@lru_cache(maxsize=64)
def _filter(size: int, target: int) -> _Filter:
    """Pillow's bicubic filter (a = -0.5, stretched where it shrinks) from `size` rows to `target`."""
    scale = size / target
    stretch = max(scale, 1.0)
    centre = (np.arange(target) + 0.5) * scale
    first = np.maximum((centre - 2.0 * stretch + 0.5).astype(np.int64), 0)
    end = np.minimum((centre + 2.0 * stretch + 0.5).astype(np.int64), size)
    index = first[:, None] + np.arange((end - first).max())
    inside = index < end[:, None]
    weights = np.where(inside, _bicubic((index - centre[:, None] + 0.5) * (1.0 / stretch)), 0.0)
    total = np.zeros(target)
    for column in weights.T:  # in Pillow's order: another one may change the last bit of the sum
        total += column
    scaled = weights / total[:, None] * ONE
    fixed = np.where(scaled < 0, scaled - 0.5, scaled + 0.5).astype(np.int64)
    index = np.minimum(index, size - 1)
    k = index.shape[1]
    rounding = k * 2.0**-24 / (1 - k * 2.0**-24)
    bound = rounding * 255 * float(np.abs(fixed).sum(axis=1).max()) / ONE
    bags = (torch.from_numpy(index.ravel()), torch.arange(0, index.size, k), torch.from_numpy(fixed.ravel() / ONE))
    return _Filter(index, fixed, bound, (*bags[:2], bags[2].float()))


def _bicubic(x: np.ndarray) -> np.ndarray:
    x, a = np.abs(x), -0.5
    near = ((a + 2.0) * x - (a + 3.0)) * x * x + 1
    far = (((x - 5) * x + 8) * x - 4) * a
    return np.where(x < 1.0, near, np.where(x < 2.0, far, 0.0))


def _mixed(picture: np.ndarray, target: int) -> np.ndarray:
    """(N, L, 3) uint8 to (target, L, 3): every column resized to as many rows as asked for."""
    if len(picture) == target:
        return picture
    rows = picture.reshape(len(picture), -1)
    made = np.empty((target, rows.shape[1]), np.uint8)
    taps = _filter(len(rows), target)
    for start in range(0, rows.shape[1], STRIP):
        strip, part = rows[:, start : start + STRIP], made[:, start : start + STRIP]
        sums = taps.sums(torch.from_numpy(strip.astype(np.float32)))
        whole = np.rint(sums)
        np.abs(np.subtract(sums, whole, out=sums), out=sums)
        doubtful = np.flatnonzero(sums >= 0.5 - taps.bound)
        np.copyto(part, torch.from_numpy(whole).clamp_(0, 255).numpy(), casting="unsafe")
        if len(doubtful):
            row, column = np.divmod(doubtful, part.shape[1])
            part[row, column] = taps.exact(strip, row, column)
    return made.reshape(target, *picture.shape[1:])


def _turned(picture: np.ndarray) -> np.ndarray:
    """Rows and columns exchanged, which Pillow does several times faster than numpy."""
    return np.asarray(Image.fromarray(picture).transpose(Image.Transpose.TRANSPOSE))
