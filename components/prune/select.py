"""Selection: the top share of each source by DeltaLoss (paper section 2.3, equation 2)."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from fractions import Fraction


def keep_top(
    ids: Sequence[str], sources: Sequence[str], scores: Sequence[float], ratio: float, ratio_of: Mapping[str, float]
) -> set[str]:
    """Ids of the ceil(ratio * n) samples of highest score within each source.

    A score that is not a number ranks last; equal scores rank by id, so that the choice is the same every time.

    Args:
        ids: sample ids.
        sources: source of each sample.
        scores: DeltaLoss of each sample; high is informative.
        ratio: share of a source that stays, in (0, 1].
        ratio_of: share of single sources, where it differs.
    """
    members: dict[str, list[tuple[float, str]]] = defaultdict(list)
    for sample, source, score in zip(ids, sources, scores, strict=True):
        members[source].append((math.inf if math.isnan(score) else -score, sample))
    return {
        sample
        for source, ranked in members.items()
        for _, sample in sorted(ranked)[: kept(ratio_of.get(source, ratio), len(ranked))]
    }


def kept(ratio: float, n: int) -> int:
    """ceil(ratio * n) for the ratio as it is written: of 100 samples 0.07 keeps 7, while 0.07 * 100 is above 7."""
    return math.ceil(Fraction(str(ratio)) * n)
