from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nvila.components.model.config.config import ModelConfig
from nvila.components.model.vision.s2 import merge_chessboard, merge_scales, split_chessboard, tiles_per_unit


@given(st.integers(1, 3), st.integers(1, 4), st.integers(1, 4), st.integers(1, 5))
def test_chessboard(visuals: int, rows: int, columns: int, side: int) -> None:
    """Prevents tiles from changing places in the merged map, and a split that does not undo the merge."""
    tiles = torch.arange(visuals * rows * columns * side * side * 2.0).view(-1, side, side, 2)
    maps = merge_chessboard(tiles, rows, columns)
    for v in range(visuals):
        for r in range(rows):
            for k in range(columns):
                part = maps[v, r * side : (r + 1) * side, k * side : (k + 1) * side]
                assert torch.equal(part, tiles[(v * rows + r) * columns + k])
    assert torch.equal(split_chessboard(maps, rows, columns), tiles)


def area(grid: np.ndarray, height: int, width: int) -> np.ndarray:
    """Adaptive means over windows floor(i h / H) to ceil((i + 1) h / H), by loops."""
    h, w, _ = grid.shape
    out = np.zeros((height, width, grid.shape[2]))
    for i in range(height):
        for j in range(width):
            rows = slice(i * h // height, -(-(i + 1) * h // height))
            columns = slice(j * w // width, -(-(j + 1) * w // width))
            out[i, j] = grid[rows, columns].mean(axis=(0, 1))
    return out


@pytest.mark.parametrize("output", [-1, 0, 1])
@pytest.mark.parametrize("block", [(3, 3), (3, 4), (1, 10)])
def test_scales_are_stacked(configure: Callable[..., ModelConfig], output: int, block: tuple[int, int]) -> None:
    """Prevents a wrong channel order, map orientation, output size or interpolation, against literal loops."""
    config = configure(tile=56, s2_scales=(56, 112, 168), max_tiles=12, s2_output_scale=output)
    side, channels, visuals = 4, 3, 2
    count = tiles_per_unit(block, config)
    assert count == 1 + 4 + block[0] * block[1]
    generator = torch.Generator().manual_seed(1)
    features = torch.randn(visuals, count, side * side, channels, generator=generator)
    merged = merge_scales(features, block, config)
    rows, columns = block if output == -1 else ((1, 1) if output == 0 else (2, 2))
    assert merged.shape == (visuals * rows * columns, side * side, 3 * channels)
    for v in range(visuals):
        start, maps = 0, []
        for grid_rows, grid_columns in ((1, 1), (2, 2), block):
            whole = np.zeros((grid_rows * side, grid_columns * side, channels))
            for tile in range(grid_rows * grid_columns):
                y, x = tile // grid_columns * side, tile % grid_columns * side
                whole[y : y + side, x : x + side] = features[v, start + tile].view(side, side, channels).numpy()
            start += grid_rows * grid_columns
            maps.append(area(whole, rows * side, columns * side))
        stacked = np.concatenate(maps, axis=-1)
        for b in range(rows * columns):
            y, x = b // columns * side, b % columns * side
            expected = stacked[y : y + side, x : x + side].reshape(side * side, -1)
            assert np.allclose(merged[v * rows * columns + b].numpy(), expected, atol=1e-5)


def test_one_tile_repeats_its_channels(configure: Callable[..., ModelConfig]) -> None:
    """Prevents interleaved instead of repeated channels, which the projector's weights would not understand."""
    features = torch.randn(3, 1, 4, 5)
    merged = merge_scales(features, None, configure())
    assert torch.equal(merged, torch.cat([features[:, 0], features[:, 0]], dim=-1))
