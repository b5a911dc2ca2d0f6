"""What a stage trains of a model, and what it holds in four bits: counts of weights, from the model's shape."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nvila.components.contracts.recipe.train import Stage
    from nvila.components.model.shape import Shape

NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)
"""Of a weight: four bits, a scale of a byte for 64 of them, and one of four bytes for 256 scales."""


def trained(shape: Shape, stage: Stage) -> dict[str, int]:
    """Weights that learn, by part."""
    return {part: _trained(shape, stage, part) for part in stage.trainable}


def _trained(shape: Shape, stage: Stage, part: str) -> int:
    method, rank = stage.learning[part], stage.lora.rank
    if method == "full":
        return shape.parameters[part]
    if method == "layernorm":
        return shape.norms
    magnitudes = sum(rows for rows, _ in shape.linears[part]) if method == "dora" else 0
    return rank * sum(rows + columns for rows, columns in shape.linears[part]) + magnitudes


def adapters(shape: Shape, stage: Stage, parts: Collection[str] | None = None) -> int:
    """Weights of the adapters of some parts, or of all: what a stage's model has besides its own."""
    learnt = trained(shape, stage)
    return sum(learnt[part] for part in stage.adapted if parts is None or part in parts)


def quantized(shape: Shape, stage: Stage) -> int:
    """Weights that lie in four bits: those of the Linears of blocks whose adapters learn so."""
    parts = [part for part, method in stage.learning.items() if method == "qlora"]
    return sum(rows * columns for part in parts for rows, columns in shape.linears[part])
