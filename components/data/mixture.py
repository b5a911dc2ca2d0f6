"""Mixtures: which samples a stage sees and in which order, as a pure function of data, passes and seed."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
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
    drawn: list[T] = []
    for name in sorted(passes):
        samples = subsets[name]
        whole, rest = divmod(passes[name], 1.0)
        drawn.extend(list(samples) * int(whole))
        drawn.extend(rng.sample(list(samples), round(rest * len(samples))))
    rng.shuffle(drawn)
    return drawn
