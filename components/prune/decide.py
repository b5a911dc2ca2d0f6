"""From losses and groups to what stays: one score a sample by the recipe's method, one rule that selects. No model is
asked here, so that every method and ratio can be read off one table of losses."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import TYPE_CHECKING, Any

from nvila.components.contracts.recipe.prune import JUDGED, PruneSettings
from nvila.components.prune.select import keep_top

if TYPE_CHECKING:
    import numpy as np

BLANK = "blank"
"""In the place of a reference's name: the large one without the picture."""
MARGIN_NATS = 0.1
"""DeltaLoss per answer token that is about 0."""
EASY_NATS = 0.6931
"""Loss per answer token below which the large reference knows the answer: it gives it more than one half."""
CATEGORIES = ("too easy", "both fail", "distracting", "informative")


@dataclass
class Columns:
    """What is known of n samples, in the order of the sample table."""

    ties: np.ndarray
    """(n,) uint64: a digest of each id."""
    source: np.ndarray
    """(n,) int32, places in `sources`."""
    group: np.ndarray
    """(n,) int32, places in `groups`."""
    kind: np.ndarray
    """(n,) int32, places in `kinds`."""
    sources: list[str]
    groups: list[str]
    kinds: list[str]
    loss: dict[str, np.ndarray] = field(default_factory=dict)
    """(n,) float64 by `small`, `large`, `blank`: nats summed over the answer; not a number where there is none."""
    tokens: dict[str, np.ndarray] = field(default_factory=dict)
    """(n,) int32 by `small` and `large`: answer tokens."""
    cluster: np.ndarray | None = None
    """(n,) int32: the k-means cluster of its picture, -1 where it could not be seen."""
    usable: np.ndarray | None = None
    """(n,) bool: not found to be unusable; None where no one has looked."""

    def losses(self, name: str, score: str) -> np.ndarray:
        """(n,) losses of a reference, `sum` or `mean` over answer tokens; not a number where it was not asked."""
        import numpy as np

        if name not in self.loss:
            return np.full(len(self.ties), np.nan)
        tokens = self.tokens["large" if name == BLANK else name]
        return self.loss[name] if score == "sum" else self.loss[name] / np.maximum(tokens, 1)

    def delta(self, score: str) -> np.ndarray:
        """(n,) DeltaLoss."""
        return self.losses("small", score) - self.losses("large", score)


@dataclass(frozen=True)
class Decision:
    """What became of each sample."""

    score: np.ndarray
    """(n,) float64: what its unit was ranked by."""
    kept: np.ndarray
    """(n,) bool."""
    unit: np.ndarray
    """(n,) int32, places in `units`: its group, or of a group in which some kinds are not believed, the part."""
    units: list[str]
    ranked_by: list[str]
    """Of each unit."""


def decide(columns: Columns, believed: Collection[str], prune: PruneSettings, seed: int) -> Decision:
    """Score and select.

    Args:
        columns: losses, groups and kinds.
        believed: kinds of question in which the references have proved themselves; of no concern to other methods.
        prune: method, score, ratios, and what becomes of kinds that are not believed.
        seed: of random choices.
    """
    import numpy as np

    unit, units, trusted = _units(columns, believed, prune)
    method = prune.method
    scores = _scores(columns, method, prune.score, seed)
    ranked_by: list[str] = [method if fine else "random" if prune.untrusted == "random" else "none" for fine in trusted]
    if not all(trusted):
        scores = np.where(np.array(trusted)[unit], scores, _scores(columns, "random", prune.score, seed))
    source = np.zeros(len(units), dtype=np.int64)
    source[unit] = columns.source
    ratios = [
        1.0 if by == "none" else prune.keep_ratio_of.get(columns.sources[of], prune.keep_ratio)
        for by, of in zip(ranked_by, source, strict=True)
    ]
    kept = keep_top(unit, scores, columns.ties, ratios)
    if columns.usable is not None:
        kept &= columns.usable
    return Decision(scores, kept, unit, units, ranked_by)


def categories(columns: Columns) -> np.ndarray:
    """(n,) int8, places in `CATEGORIES`, -1 where a loss is missing (paper section 2.3): DeltaLoss about 0 is too easy
    or too hard for both references, below 0 distracting, above informative."""
    import numpy as np

    found = np.full(len(columns.ties), -1, dtype=np.int8)
    delta, large = columns.delta("mean"), columns.losses("large", "mean")
    known = np.isfinite(delta)
    for place, here in enumerate(
        (
            (np.abs(delta) < MARGIN_NATS) & (large < EASY_NATS),
            (np.abs(delta) < MARGIN_NATS) & (large >= EASY_NATS),
            delta <= -MARGIN_NATS,
            delta >= MARGIN_NATS,
        )
    ):
        found[known & here] = place
    return found


def ties(ids: Iterable[str]) -> np.ndarray:
    """(n,) uint64: a digest of each sample's id, which decides where scores are equal and where chance does."""
    import numpy as np

    return np.array([int.from_bytes(blake2b(one.encode(), digest_size=8).digest(), "big") for one in ids], np.uint64)


def random_scores(ties: np.ndarray, seed: int) -> np.ndarray:
    """(n,) float64 in [0, 1), a function of the samples' ids and the seed alone (SplitMix64)."""
    import numpy as np

    with np.errstate(over="ignore"):
        mixed = ties + np.uint64(0x9E3779B97F4A7C15) * np.uint64((2 * seed + 1) % 2**64)
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
            mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(factor)
    return (mixed >> np.uint64(11)).astype(np.float64) / 2**53


def _units(columns: Columns, believed: Collection[str], prune: PruneSettings) -> tuple[Any, list[str], list[bool]]:
    """The unit of each sample, their names, and whether each is believed."""
    import numpy as np

    if prune.method not in JUDGED:
        return columns.group, columns.groups, [True] * len(columns.groups)
    fine = np.array([kind in believed for kind in columns.kinds], dtype=bool)[columns.kind]
    pairs = columns.group.astype(np.int64) * (len(columns.kinds) + 1) + np.where(fine, 0, columns.kind + 1)
    found, unit = np.unique(pairs, return_inverse=True)
    names, trusted = [], []
    for pair in found.tolist():
        group, kind = divmod(pair, len(columns.kinds) + 1)
        own = columns.groups[group]
        names.append(own if not kind or columns.kinds[kind - 1] == own else f"{own} [{columns.kinds[kind - 1]}]")
        trusted.append(not kind)
    return unit.astype(np.int32), names, trusted


def _scores(columns: Columns, method: str, score: str, seed: int) -> np.ndarray:
    import numpy as np

    if method == "deltaloss":
        return columns.delta(score)
    if method == "multimodal-gain":
        return columns.losses(BLANK, score) - columns.losses("large", score)
    chance = random_scores(columns.ties, seed)
    if method != "clusters":
        return chance
    assert columns.cluster is not None
    return -_rank_within(columns.group.astype(np.int64) * (columns.cluster.max() + 2) + columns.cluster + 1, chance)


def _rank_within(cells: np.ndarray, order: np.ndarray) -> np.ndarray:
    """(n,) place of each sample among those of its cell: the top of all by it takes as many from each cell."""
    import numpy as np

    sorted_by = np.lexsort((order, cells))
    _, first, sizes = np.unique(cells[sorted_by], return_index=True, return_counts=True)
    rank = np.empty(len(cells), dtype=np.float64)
    rank[sorted_by] = np.arange(len(cells)) - np.repeat(first, sizes)
    return rank
