"""The tower's feature: the hidden state at `select_layer`, without computing the blocks above it."""

from __future__ import annotations

from typing import Any

import torch


def used_blocks(layers: int, select_layer: int) -> int:
    """Blocks that the hidden state at `select_layer` needs; index 0 is the embeddings, -1 the last block's output."""
    return select_layer if select_layer >= 0 else layers + 1 + select_layer


def drop_unused(tower: Any, select_layer: int) -> None:
    """Take away what no feature needs: a serving folder has no weights for it."""
    del tower.encoder.layers[used_blocks(tower.config.num_hidden_layers, select_layer) :]
    del tower.post_layernorm


def tower_features(tower: Any, tiles: torch.Tensor, select_layer: int) -> torch.Tensor:
    """(T, 3, S, S) tiles to (T, N, C) features of a `SiglipVisionModel`.

    No layer norm follows: the blocks above and `post_layernorm` get no gradient, as in the reference.
    """
    hidden = tower.embeddings(tiles)
    for block in tower.encoder.layers[: used_blocks(tower.config.num_hidden_layers, select_layer)]:
        hidden = block(hidden, None)
    return hidden
