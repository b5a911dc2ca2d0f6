"""What a stage trains of a model, and what it holds in four bits: counts of weights, from the model's shape."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nvila.components.model.shape import Shape

NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)
"""Of a weight: four bits, a scale of a byte for 64 of them, and one of four bytes for 256 scales."""


def trained(shape: Shape, learning: Mapping[str, str], rank: int) -> dict[str, int]:
    """Weights that learn, by part.

    Args:
        shape: of the model.
        learning: the method of each part that learns.
        rank: of adapters.
    """
    return {part: _trained(shape, part, method, rank) for part, method in learning.items()}


def _trained(shape: Shape, part: str, method: str, rank: int) -> int:
    if method == "full":
        return shape.parameters[part]
    if method == "layernorm":
        return shape.norms
    magnitudes = sum(rows for rows, _ in shape.linears[part]) if method == "dora" else 0
    return rank * sum(rows + columns for rows, columns in shape.linears[part]) + magnitudes


def quantized(shape: Shape, learning: Mapping[str, str]) -> int:
    """Weights that lie in four bits: those of the Linears of blocks whose adapters learn so."""
    parts = [part for part, method in learning.items() if method == "qlora"]
    return sum(rows * columns for part in parts for rows, columns in shape.linears[part])
