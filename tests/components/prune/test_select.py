"""Selection: the share of each group that stays."""

import math
from fractions import Fraction

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from nvila.components.prune.select import keep_top, kept


@given(st.lists(st.tuples(st.integers(0, 1), st.floats(-9, 9)), min_size=1, max_size=60), st.floats(0.01, 1.0))
def test_each_group_keeps_its_own_top_share(rows: list[tuple[int, float]], ratio: float) -> None:
    """Prevents a group with low scores from vanishing: the share is taken within each group (equation 2)."""
    groups, scores = np.array([g for g, _ in rows]), np.array([s for _, s in rows])
    stays = keep_top(groups, scores, np.arange(len(rows), dtype=np.uint64), [ratio, ratio])
    for group in (0, 1):
        mine = scores[groups == group]
        chosen = scores[(groups == group) & stays]
        assert len(chosen) == math.ceil(Fraction(str(ratio)) * len(mine))
        assert sorted(chosen) == sorted(np.sort(mine)[::-1][: len(chosen)])


def test_ratio_of_one_group_and_scores_that_are_not_numbers() -> None:
    """Prevents a NaN score from being kept as the best, and a group's own ratio from being ignored."""
    groups, ties = np.array([0, 0, 1, 1]), np.arange(4, dtype=np.uint64)
    stays = keep_top(groups, np.array([math.nan, -3.0, 1.0, 2.0]), ties, [0.5, 1.0])
    assert stays.tolist() == [False, True, True, True]


def test_equal_scores_are_parted_by_the_samples_own_digests() -> None:
    """A choice that follows the order of rows would change when a file is sorted anew."""
    scores, ties = np.zeros(6), np.array([5, 3, 9, 1, 7, 2], dtype=np.uint64)
    assert keep_top(np.zeros(6, dtype=int), scores, ties, [0.5]).tolist() == [False, True, False, True, False, True]


def test_the_share_is_that_of_the_ratio_as_written() -> None:
    """Prevents one sample too many where the product of two floats is a hair above the whole number."""
    assert [kept(ratio, 100) for ratio in (0.07, 0.14, 0.55, 0.29, 1.0)] == [7, 14, 55, 29, 100]
    assert kept(0.301, 100) == 31 and kept(1e-9, 3) == 1
