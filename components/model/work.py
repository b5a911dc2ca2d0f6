"""Floating-point operations of the model: one rule for the hours that a plan names and for the MFU of a run.

A matrix of n parameters takes 2 n operations a token. Attention takes 4 w more for every pair of tokens of which one
sees the other, w channels wide: all pairs of a tile in the tower, half of a row's in the decoder.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import astuple, dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nvila.components.model.shape import Shape


@dataclass(frozen=True)
class Load:
    """What there is to compute, of one sample or of many."""

    tiles: float = 0
    """Pictures that the tower sees."""
    projected: float = 0
    """Tokens that leave the projector; pooling of a video comes after it."""
    positions: float = 0
    """Of the decoder, padding left out."""
    pairs: float = 0
    """Pairs of positions of which one sees the other, summed over samples: half the square of a sample's length."""
    predicted: float = 0
    """Positions at which the next token is predicted."""

    def __add__(self, other: Load) -> Load:
        return Load(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))


def forward(shape: Shape, load: Load) -> dict[str, float]:
    """Floating-point operations of the forward pass, by part."""
    llm, vision = shape.config.llm, shape.config.vision
    patches = load.tiles * shape.tower_tokens
    tower = 2 * shape.tower_matrices * patches
    tower += shape.tower_blocks * 4 * patches * int(vision["hidden_size"]) * shape.tower_tokens
    decoder = 2 * shape.decoder_matrices * load.positions
    decoder += int(llm["num_hidden_layers"]) * 4 * int(llm["hidden_size"]) * load.pairs
    decoder += 2 * int(llm["vocab_size"]) * int(llm["hidden_size"]) * load.predicted
    return {
        "vision_tower": tower,
        "mm_projector": 2 * shape.parameters["mm_projector"] * load.projected,
        "llm": decoder,
    }


def operations(shape: Shape, learning: Mapping[str, str], load: Load) -> float:
    """Floating-point operations of forward and backward pass; recomputed activations do not count, nor do adapters,
    which take a few per cent of what they lie beside.

    Args:
        shape: of the model.
        learning: by part that learns the method: where it is not `full`, gradients pass through frozen matrices alone.
        load: what is computed.
    """
    work, before = 0.0, False
    for part, through in forward(shape, load).items():
        method = learning.get(part)
        work += through * (3 if method == "full" else 2 if method or before else 1)
        before = before or method is not None
    return work
