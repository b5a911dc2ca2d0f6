"""Which grid of tiles an image gets: pure integer functions of its size (`llava/mm_utils.py`)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

Grid = tuple[int, int]
"""(columns, rows)."""


@lru_cache(maxsize=64)
def candidate_grids(min_tiles: int, max_tiles: int) -> tuple[Grid, ...]:
    """All (columns, rows) with `min_tiles <= columns * rows <= max_tiles`, by tile count, then columns.

    The fixed order decides exact ties in `closest_grid`; the reference leaves it to the order of a set.
    """
    grids = [
        (columns, rows)
        for columns in range(1, max_tiles + 1)
        for rows in range(1, max_tiles // columns + 1)
        if columns * rows >= min_tiles
    ]
    return tuple(sorted(grids, key=lambda grid: (grid[0] * grid[1], grid[0])))


def closest_grid(width: int, height: int, candidates: Sequence[Grid], tile_pixels: int) -> Grid:
    """The candidate whose columns/rows is nearest to width/height.

    The distance is |width/height - columns/rows|, so landscape and portrait are not symmetric. On an exact tie the
    later candidate wins when the image has more than half of that grid's pixels.
    """
    ratio = width / height
    best, best_distance = candidates[0], float("inf")
    for columns, rows in candidates:
        distance = abs(ratio - columns / rows)
        large_enough = width * height > 0.5 * tile_pixels**2 * columns * rows
        if distance < best_distance or (distance == best_distance and large_enough):
            best, best_distance = (columns, rows), distance
    return best


def dynamic_grid(width: int, height: int, tile_pixels: int, max_tiles: int) -> Grid:
    """Grid of the dynamic tiling of NVILA-Lite: 1 to `max_tiles` tiles (`dynamic_preprocess`)."""
    return closest_grid(width, height, candidate_grids(1, max_tiles), tile_pixels)


def dynamic_s2_grid(width: int, height: int, scales: Sequence[int], max_tiles: int) -> Grid:
    """Grid of the last scale of Dynamic-S2: at least as many tiles as its square has (`dynamic_s2_preprocess`)."""
    square = (scales[-1] // scales[0]) ** 2
    return closest_grid(width, height, candidate_grids(square, max_tiles), scales[0])
