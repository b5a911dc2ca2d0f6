"""Handwritten digits of scikit-learn, parted once into training and held-out digits for the sources that use them."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL import Image

HELD_OUT_DIGITS = 500
"""Of 1,797; the others are for training."""
PARTING_SEED = 1
"""The same parting in `digits` and `clips`: what one holds out, the other does not train on."""


@dataclass(frozen=True)
class Digits:
    """Pictures of single digits (8x8 pixels, gray) by class."""

    by_class: dict[int, list[Image.Image]]
    indices: frozenset[int]
    """Positions in `sklearn.datasets.load_digits()`."""

    def draw(self, digit: int, side_pixels: int, choice: random.Random) -> Image.Image:
        """Some picture of `digit`, enlarged to `side_pixels` squared."""
        from PIL import Image

        return choice.choice(self.by_class[digit]).resize((side_pixels, side_pixels), Image.Resampling.BILINEAR)


def load() -> tuple[Digits, Digits]:
    """Training digits and held-out digits; no digit is in both."""
    import numpy as np
    from PIL import Image
    from sklearn.datasets import load_digits

    data = load_digits()
    pictures = [Image.fromarray(np.rint(pixels * 255 / 16).astype(np.uint8)) for pixels in data.images]
    order = list(range(len(pictures)))
    random.Random(PARTING_SEED).shuffle(order)
    parts = []
    for indices in (order[HELD_OUT_DIGITS:], order[:HELD_OUT_DIGITS]):
        by_class: dict[int, list[Image.Image]] = {digit: [] for digit in range(10)}
        for index in indices:
            by_class[int(data.target[index])].append(pictures[index])
        parts.append(Digits(by_class, frozenset(indices)))
    return parts[0], parts[1]


def answer_pairs(count: int, choice: random.Random) -> list[tuple[int, int]]:
    """`count` pairs of different digits in which each digit comes up equally often (exactly so for multiples of 90)."""
    pairs = [(a, b) for a in range(10) for b in range(10) if a != b]
    found: list[tuple[int, int]] = []
    while len(found) < count:
        choice.shuffle(pairs)
        found.extend(pairs)
    return found[:count]
