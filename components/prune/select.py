"""Selection: the top share of each group by its score (paper section 2.3, equation 2)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from nvila.components.data.mixture import kept

if TYPE_CHECKING:
    import numpy as np


def keep_top(groups: np.ndarray, scores: np.ndarray, ties: np.ndarray, ratios: Sequence[float]) -> np.ndarray:
    """Which samples stay: of each group the ceil(ratio * n) of highest score.

    Args:
        groups: (n,) number of each sample's group.
        scores: (n,) high stays; a score that is not a number ranks last.
        ties: (n,) decides between equal scores, the lowest first, so that the choice is the same every time.
        ratios: share of each group that stays, in (0, 1].

    Returns:
        (n,) bool.
    """
    import numpy as np

    order = np.lexsort((ties, np.where(np.isnan(scores), np.inf, -scores), groups))
    sizes = np.bincount(groups, minlength=len(ratios))
    first = np.concatenate(([0], np.cumsum(sizes)[:-1]))
    rank = np.empty(len(groups), dtype=np.int64)
    rank[order] = np.arange(len(groups)) - np.repeat(first, sizes)
    places = np.array([kept(ratio, int(size)) for ratio, size in zip(ratios, sizes, strict=True)], dtype=np.int64)
    return rank < places[groups]
