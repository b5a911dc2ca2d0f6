"""Stacking the features of several scales (S2, Dynamic-S2): plain tensor functions; `llava/model/llava_arch.py`.

Sits between the vision tower and the projector. Legend: V visuals, T tiles of each, N features of a tile (s x s),
C channels, R x K blocks.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.nn import functional as F

from nvila.components.model.config.config import ModelConfig
from nvila.components.model.vision.preprocess import BlockSize

AT_ONCE_VALUES = 2**24
"""Merged features in memory at a time where they are made in parts."""


def tiles_per_unit(block_size: BlockSize | None, config: ModelConfig) -> int:
    """Tiles of one picture or frame: all lower scales' squares and the last scale's grid."""
    if block_size is None:
        return 1
    return sum(tiles**2 for tiles in config.scale_tiles[:-1]) + block_size[0] * block_size[1]


def output_blocks(block_size: BlockSize | None, config: ModelConfig) -> BlockSize:
    """(rows, columns) of tiles in the map of stacked features."""
    if block_size is None:
        return (1, 1)
    index = config.s2_output_scale % len(config.s2_scales)
    last = index == len(config.s2_scales) - 1
    return block_size if last else (config.scale_tiles[index], config.scale_tiles[index])


def projector_blocks(block_size: BlockSize | None, config: ModelConfig) -> BlockSize:
    """(rows, columns) of the blocks in which the projector sees that map: the tiles; plain S2 projects it whole.

    Where space-to-channel cells do not divide a tile, a whole map has fewer of them: 16 instead of 36 for 12 x 12
    features of tiles of 4 x 4 and cells of 3 x 3.
    """
    return (1, 1) if config.vision_mode == "s2" else output_blocks(block_size, config)


def merge_chessboard(tiles: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """(V * rows * columns, s, s, C) tiles, row by row, to (V, rows * s, columns * s, C) maps."""
    _, s, _, c = tiles.shape
    board = tiles.reshape(-1, rows, columns, s, s, c)
    return board.permute(0, 1, 3, 2, 4, 5).reshape(-1, rows * s, columns * s, c)


def split_chessboard(maps: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """The inverse of `merge_chessboard`: (V, rows * s, columns * s, C) to (V * rows * columns, s, s, C)."""
    _, height, width, c = maps.shape
    board = maps.reshape(-1, rows, height // rows, columns, width // columns, c)
    return board.permute(0, 1, 3, 2, 4, 5).reshape(-1, height // rows, width // columns, c)


def merge_scales(features: torch.Tensor, block_size: BlockSize | None, config: ModelConfig) -> torch.Tensor:
    """Stack the scales of V visuals of the same `block_size` and cut the result into the projector's blocks.

    Args:
        features: (V, T, N, C) of the tower; T is `tiles_per_unit(block_size)`, scales ascending, tiles row by row.
        block_size: grid of the last scale, or None for one tile, whose channels are repeated for every scale.
        config: scales and the scale whose size the others are brought to (by area means, in float32).

    Returns:
        (V * R * K, M, C * scales) with (R, K) = `projector_blocks(block_size)`, channels in ascending scale order.
    """
    return torch.cat(list(merged_parts(features, block_size, config)))


def merged_parts(features: torch.Tensor, block_size: BlockSize | None, config: ModelConfig) -> Iterator[torch.Tensor]:
    """What `merge_scales` returns, in parts: the whole is three times as large as the features."""
    n, c = features.shape[2:]
    repeats = len(config.s2_scales) if config.is_s2 else 1
    if block_size is None or not config.is_s2:
        for tiles in features.reshape(-1, n, c).split(max(1, AT_ONCE_VALUES // (n * c * repeats))):
            yield tiles.repeat(1, 1, repeats) if repeats > 1 else tiles
        return
    side = round(n**0.5)
    rows, columns = output_blocks(block_size, config)
    grids = [(tiles, tiles) for tiles in config.scale_tiles[:-1]] + [block_size]
    values = rows * columns * n * c * repeats
    blocks = projector_blocks(block_size, config)
    step = rows if values <= AT_ONCE_VALUES or blocks == (1, 1) else 1
    for visuals in features.split(max(1, AT_ONCE_VALUES // values)):
        scales = visuals.split([r * k for r, k in grids], dim=1)
        maps = [
            _area(merge_chessboard(scale.reshape(-1, side, side, c), r, k), rows * side, columns * side)
            for scale, (r, k) in zip(scales, grids, strict=True)
        ]
        for row in range(0, rows, step):
            stacked = torch.cat([whole[:, row * side : (row + step) * side] for whole in maps], dim=-1)
            yield split_chessboard(stacked, min(step, blocks[0]), blocks[1]).flatten(1, 2)


def _area(maps: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Area interpolation of (V, h, w, C) maps; windows are fractional where sizes do not divide."""
    if maps.shape[1:3] == (height, width):
        return maps
    resized = F.interpolate(maps.permute(0, 3, 1, 2).float(), size=(height, width), mode="area")
    return resized.permute(0, 2, 3, 1).to(maps.dtype)
