"""Floating-point operations of the model: one rule for the hours that a plan names and for the MFU of a run.

A matrix of n parameters takes 2 n operations a token. Attention takes 4 w more for every pair of tokens of which one
sees the other, w channels wide: all pairs of a tile in the tower, half of a row's in the decoder.
"""

from __future__ import annotations

from dataclasses import astuple, dataclass
from typing import TYPE_CHECKING

from nvila.components.model.learning import adapters

if TYPE_CHECKING:
    from nvila.components.contracts.recipe.train import Stage
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
    attention = _attention(shape, load)
    return {part: products + attention[part] for part, products in _matrices(shape, load).items()}


def operations(shape: Shape, stage: Stage, load: Load) -> float:
    """Floating-point operations of a stage's forward and backward pass. Frozen matrices have no gradients of their own:
    where a part learns by adapters or layer norms, gradients pass through. What is computed a second time does not
    count: recomputed activations, and the products that DoRA repeats to take lengths."""
    work, before = 0.0, False
    attention = _attention(shape, load)
    tokens = {"vision_tower": load.tiles * shape.tower_tokens, "llm": load.positions}
    for part, products in _matrices(shape, load).items():
        method = stage.learning.get(part)
        through = before or method is not None
        work += products * (3 if method == "full" else 2 if through else 1) + attention[part] * (3 if through else 1)
        if part in stage.adapted:
            work += 3 * 2 * adapters(shape, stage, [part]) * tokens[part]
        before = through
    return work


def _matrices(shape: Shape, load: Load) -> dict[str, float]:
    """Operations of the products with weights."""
    llm = shape.config.llm
    decoder = 2 * shape.decoder_matrices * load.positions
    decoder += 2 * int(llm["vocab_size"]) * int(llm["hidden_size"]) * load.predicted
    return {
        "vision_tower": 2 * shape.tower_matrices * load.tiles * shape.tower_tokens,
        "mm_projector": 2 * shape.parameters["mm_projector"] * load.projected,
        "llm": decoder,
    }


def _attention(shape: Shape, load: Load) -> dict[str, float]:
    """Operations of attention: of queries with keys, and of what comes of them with values."""
    llm, vision = shape.config.llm, shape.config.vision
    seen = load.tiles * shape.tower_tokens**2
    return {
        "vision_tower": shape.tower_blocks * 4 * int(vision["hidden_size"]) * seen,
        "mm_projector": 0.0,
        "llm": int(llm["num_hidden_layers"]) * 4 * int(llm["hidden_size"]) * load.pairs,
    }
