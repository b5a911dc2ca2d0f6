"""The tower's feature: the hidden state at `select_layer`, without computing the blocks above it."""

from __future__ import annotations

from typing import Any

import torch


def used_blocks(layers: int, select_layer: int) -> int:
    """Blocks that the hidden state at `select_layer` needs; index 0 is the embeddings, -1 the last block's output."""
    return select_layer if select_layer >= 0 else layers + 1 + select_layer


def tower_features(tower: Any, tiles: torch.Tensor, select_layer: int) -> torch.Tensor:
    """(T, 3, S, S) tiles to (T, N, C) features of a `SiglipVisionModel`.

    No layer norm follows: the blocks above and `post_layernorm` get no gradient, as in the reference.
    """
    hidden = tower.embeddings(tiles)
    blocks = tower.encoder.layers
    for block in blocks[: used_blocks(len(blocks), select_layer)]:
        hidden = block(hidden, None)
    return hidden
