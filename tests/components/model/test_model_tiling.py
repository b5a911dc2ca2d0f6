from hypothesis import given
from hypothesis import strategies as st

from nvila.components.model.vision.tiling import candidate_grids, closest_grid, dynamic_grid, dynamic_s2_grid


def test_candidates_of_nvila() -> None:
    """Prevents a lost or doubled grid, and an order that depends on the process (a set's)."""
    expected = {(3, 3), (1, 9), (9, 1), (1, 10), (10, 1), (2, 5), (5, 2), (1, 11), (11, 1)}
    expected |= {(1, 12), (12, 1), (2, 6), (6, 2), (3, 4), (4, 3)}
    grids = candidate_grids(9, 12)
    assert set(grids) == expected and len(grids) == len(expected)
    assert list(grids) == sorted(grids, key=lambda g: (g[0] * g[1], g[0]))
    assert len(candidate_grids(1, 12)) == 35


def test_known_shapes() -> None:
    """Prevents rows and columns changing places."""
    assert dynamic_s2_grid(448, 448, (448, 896, 1344), 12) == (3, 3)
    assert dynamic_s2_grid(1600, 1200, (448, 896, 1344), 12) == (4, 3)
    assert dynamic_s2_grid(1200, 1600, (448, 896, 1344), 12) == (3, 4)
    assert dynamic_grid(100, 1200, 448, 12) == (1, 12)
    assert dynamic_grid(1200, 100, 448, 12) == (12, 1)


def test_distance_is_of_the_ratio_itself() -> None:
    """Prevents a symmetric (logarithmic) distance, which would cut portraits otherwise than the reference."""
    assert dynamic_grid(1405, 1000, 448, 2) == (1, 1)
    assert dynamic_grid(1000, 1405, 448, 2) == (1, 2)


def test_tie_goes_to_more_tiles_only_for_large_pictures() -> None:
    """Prevents upsampling a small picture into many tiles, and starving a large one."""
    assert dynamic_grid(39, 39, 28, 6) == (1, 1)
    assert dynamic_grid(56, 56, 28, 6) == (2, 2)


@given(st.integers(1, 4000), st.integers(1, 4000), st.integers(1, 12), st.integers(0, 8))
def test_choice_is_the_nearest(width: int, height: int, least: int, more: int) -> None:
    """Prevents a choice that is not the minimum, for any size."""
    candidates = candidate_grids(least, least + more)
    columns, rows = closest_grid(width, height, candidates, 448)
    assert (columns, rows) in candidates
    distance = abs(width / height - columns / rows)
    assert all(distance <= abs(width / height - i / j) for i, j in candidates)
    equal = [g for g in candidates if abs(width / height - g[0] / g[1]) == distance]
    large = [g for g in equal if width * height > 0.5 * 448**2 * g[0] * g[1]]
    assert (columns, rows) == (large[-1] if large else equal[0])
