"""What a projector's name says, for the recipe and the model: the reference's names and those of the ablation."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

CELLS = {
    "mlp_downsample": 2,
    "mlp_downsample_2x2_fix": 2,
    "mlp_downsample_3x3_fix": 3,
    "mlp_downsample_3x3_s2": 3,
    "mlp_downsample_3x3_s2_new": 3,
}
"""Side of the space-to-channel cell of each projector that has one."""
RESAMPLERS = ("token_learner", "perceiver")
"""Learnt compressions (table 1), with their number of tokens behind the name, as in `perceiver_121`."""
NAMES = ("identity", "linear", "mlp{N}x_gelu", *CELLS, *(f"{name}_{{N}}" for name in RESAMPLERS))
_MLP = re.compile(r"mlp([1-9]\d?)x_gelu")
_RESAMPLER = re.compile(rf"({'|'.join(RESAMPLERS)})_([1-9]\d{{0,3}})")


@dataclass(frozen=True)
class Projection:
    """One projector, as its name describes it."""

    name: str
    cell: int = 1
    """Side of the square of features that becomes one token; 1 for resamplers, whose tokens have no place."""
    linears: int | None = None
    """Linear layers of an `mlp{N}x_gelu`."""
    resampler: str | None = None
    tokens: int | None = None
    """What a resampler makes of any number of features."""

    def side(self, features: int) -> int:
        """Side of the square of tokens that becomes of a square of features with this side."""
        return math.isqrt(self.tokens) if self.tokens else -(-features // self.cell)


def projection(name: str) -> Projection:
    """The projector of this name.

    Raises:
        ValueError: there is none, or a resampler's tokens form no square, as a tile's tokens always do.
    """
    if name in CELLS:
        return Projection(name, cell=CELLS[name])
    if name in ("identity", "linear"):
        return Projection(name)
    if mlp := _MLP.fullmatch(name):
        return Projection(name, linears=int(mlp[1]))
    if not (found := _RESAMPLER.fullmatch(name)):
        raise ValueError(f"unknown projector. Use one of {', '.join(NAMES)}")
    tokens, side = int(found[2]), math.isqrt(int(found[2]))
    if side**2 != tokens:
        raise ValueError(f"{tokens} tokens are no square; the nearest are {side**2} and {(side + 1) ** 2}")
    return Projection(name, resampler=found[1], tokens=tokens)
