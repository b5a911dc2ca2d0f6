import math
from fractions import Fraction

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from nvila.components.prune.select import keep_top, kept


@given(st.lists(st.tuples(st.sampled_from("ab"), st.floats(-9, 9)), min_size=1, max_size=60), st.floats(0.01, 1.0))
def test_each_source_keeps_its_own_top_share(rows: list[tuple[str, float]], ratio: float) -> None:
    """Prevents a source with low scores from vanishing: the share is taken within each source (equation 2)."""
    ids = [str(i) for i in range(len(rows))]
    kept = keep_top(ids, [s for s, _ in rows], [d for _, d in rows], ratio, {})
    for source in {s for s, _ in rows}:
        scores = np.array([d for s, d in rows if s == source])
        chosen = [d for i, (s, d) in zip(ids, rows, strict=True) if s == source and i in kept]
        assert len(chosen) == math.ceil(Fraction(str(ratio)) * len(scores))
        assert sorted(chosen) == sorted(np.sort(scores)[::-1][: len(chosen)])


def test_ratio_of_one_source_and_scores_that_are_not_numbers() -> None:
    """Prevents a NaN score from being kept as the best, and a per-source ratio from being ignored."""
    kept = keep_top(["a", "b", "c", "d"], ["x", "x", "y", "y"], [math.nan, -3.0, 1.0, 2.0], 0.5, {"y": 1.0})
    assert kept == {"b", "c", "d"}


def test_the_share_is_that_of_the_ratio_as_written() -> None:
    """Prevents one sample too many where the product of two floats is a hair above the whole number."""
    assert [kept(ratio, 100) for ratio in (0.07, 0.14, 0.55, 0.29, 1.0)] == [7, 14, 55, 29, 100]
    assert kept(0.301, 100) == 31 and kept(1e-9, 3) == 1
