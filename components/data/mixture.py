"""Mixtures: how many samples and which a stage sees and in which order, as pure functions of data, passes and seed."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import TypeVar

T = TypeVar("T")


def draw(subsets: Mapping[str, Sequence[T]], passes: Mapping[str, float], seed: int) -> list[T]:
    """The samples of one stage in training order.

    Each subset is taken whole as often as `passes` says; the fractional rest is a random choice without repetition.
    Everything is then shuffled together. The order depends on the arguments only, so that position `n` of it is the
    whole cursor of an interrupted stage.

    Args:
        subsets: samples by subset name (`source.split`).
        passes: passes over each subset; 0.5 is half of it, 2 is twice.
        seed: of the choice and of the order.
    """
    rng = random.Random(seed)
    taken: list[T] = []
    for name in sorted(passes):
        samples = list(subsets[name])
        whole, some = _parts(passes[name], len(samples))
        taken.extend(samples * whole)
        taken.extend(rng.sample(samples, some))
    rng.shuffle(taken)
    return taken


def drawn(passes: float, n: int) -> int:
    """How many samples `draw` takes of a subset of n."""
    whole, some = _parts(passes, n)
    return n * whole + some


def _parts(passes: float, n: int) -> tuple[int, int]:
    """Whole passes, and how many of n samples the rest of a pass takes."""
    whole, rest = divmod(passes, 1.0)
    return int(whole), round(rest * n)


def kept(ratio: float, n: int) -> int:
    """How many of n samples pruning keeps: ceil(ratio * n) for the ratio as it is written. Of 100 samples 0.07 keeps
    7, while 0.07 * 100 is above 7."""
    return math.ceil(Fraction(str(ratio)) * n)
