"""What a source is made of before and after pruning, and whether it has moved farther than chance and recipe allow."""

from __future__ import annotations

import hashlib
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nvila.components.contracts.results.model import Composition
from nvila.components.data.media import Limits, MediaError, inside, size
from nvila.components.data.samples import unchanged
from nvila.components.metrics.accuracy import normal_form
from nvila.components.prune.groups import answer_kind, answer_name

if TYPE_CHECKING:
    import numpy as np
    import pyarrow

ANSWERS = 20
"""Of a source that are told one by one; the others count together."""
COUNTED = 100_000
"""Different answers that are counted at once; of more the rare count together."""
MEASURED_MEDIA = 2000
"""Of a source whose resolution is looked at, chosen by digest."""
EXACT_SIZES = 8
"""Different resolutions that are told as they are; more of them by megapixels."""
OTHERS = "others"
RESPECTS = ("answers", "answer kinds", "answer lengths", "resolutions")


@dataclass
class Shown:
    """A medium whose resolution may be looked at."""

    place: bytes
    """Digest of its name: the lowest are looked at."""
    sha256: str | None
    """Of its bytes as `validate` read them."""
    all: int = 0
    """Samples that show it."""
    kept: int = 0


@dataclass
class Makeup:
    """Counts of one source."""

    all: dict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))
    """By respect and value, of all samples."""
    kept: dict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))
    sizes: dict[tuple[str, str], Shown] = field(default_factory=dict)
    """By source's folder and name of a medium."""


def makeup(rows: Iterable[pyarrow.Table], kept: np.ndarray, limits: Limits) -> dict[str, dict[str, Composition]]:
    """By source and respect (`RESPECTS`).

    Args:
        rows: the samples, batch by batch: source, kind, root, media, answer, and media_sha256 where it is known.
        kept: (n,) bool, which of them stay, in the same order.
        limits: what their media may be.
    """
    found: dict[str, Makeup] = defaultdict(Makeup)
    kinds: dict[str, Any] = {}
    at = 0
    for batch in rows:
        columns = [batch.column(name).to_pylist() for name in ("source", "kind", "root", "media", "answer")]
        told = "media_sha256" in batch.column_names
        digests = batch.column("media_sha256").to_pylist() if told else [None] * len(batch)
        for row in zip(*columns, digests, kept[at : at + len(batch)].tolist(), strict=True):
            kinds[row[0]] = row[1]
            _count(found[row[0]], *row[2:])
        at += len(batch)
    for source, made in found.items():
        _measure(made, kinds[source], limits)
    return {source: {name: _composition(made, name) for name in RESPECTS} for source, made in sorted(found.items())}


def moved(sources: Mapping[str, Mapping[str, Composition]], limit: float) -> list[str]:
    """In words, what moved by more than `limit` beyond what a random choice of the same size moves (`_chance`).

    Args:
        sources: compositions by source and respect.
        limit: share of samples.
    """
    return [
        f"{source}: {name} moved by {made.shift:.2f} (limit {limit:.2f}): {_farthest(made)}"
        for source, respects in sources.items()
        for name, made in respects.items()
        if made.shift > limit + made.chance
    ]


def _farthest(made: Composition, values: int = 3) -> str:
    """The values that moved most."""
    pairs = {v: (made.before.get(v, 0.0), made.after.get(v, 0.0)) for v in (*made.before, *made.after)}
    most = sorted(pairs.items(), key=lambda item: -abs(item[1][1] - item[1][0]))[:values]
    return ", ".join(f"{value} {before:.2f} -> {after:.2f}" for value, (before, after) in most)


def _count(
    made: Makeup, root: str, media: list[str], answer: str, digests: list[str | None] | None, stays: bool
) -> None:
    values = {
        "answers": answer_name(answer),
        "answer kinds": answer_kind(answer),
        "answer lengths": _length(normal_form(answer)),
    }
    for counts in (made.all, made.kept) if stays else (made.all,):
        for name, value in values.items():
            counts[name][value] += 1
        if len(counts["answers"]) > COUNTED:
            few = Counter(dict(counts["answers"].most_common(COUNTED // 2)))
            few[OTHERS] += counts["answers"].total() - few.total()
            counts["answers"] = few
    for name in media[:1]:
        shown = made.sizes.get((root, name))
        if shown is None:
            place = hashlib.blake2b(f"{root}\0{name}".encode("utf-8", "surrogatepass"), digest_size=8).digest()
            shown = made.sizes[root, name] = Shown(place, digests[0] if digests else None)
        shown.all, shown.kept = shown.all + 1, shown.kept + stays
    if len(made.sizes) > 2 * MEASURED_MEDIA:
        made.sizes = dict(_chosen(made))


def _chosen(made: Makeup) -> list[tuple[tuple[str, str], Shown]]:
    return sorted(made.sizes.items(), key=lambda item: item[1].place)[:MEASURED_MEDIA]


def _measure(made: Makeup, kind: Any, limits: Limits) -> None:
    """Count the resolutions of the chosen media by the samples that show them."""
    chosen = _chosen(made)
    known = {path: _size(path, shown.sha256, kind, limits) for path, shown in chosen}
    exact = len(set(known.values())) <= EXACT_SIZES
    for path, shown in chosen:
        found = known[path]
        value = "unknown" if found is None else f"{found[0]}x{found[1]}" if exact else _megapixels(*found)
        made.all["resolutions"][value] += shown.all
        made.kept["resolutions"][value] += shown.kept


def _size(path: tuple[str, str], sha256: str | None, kind: Any, limits: Limits) -> tuple[int, int] | None:
    root, name = path
    try:
        return size(unchanged(inside(Path(root), name), sha256), kind, limits)
    except (MediaError, OSError, ValueError):  # no path at all, as a name with a zero byte
        return None


def _composition(made: Makeup, name: str) -> Composition:
    told = [value for value, _ in made.all[name].most_common(ANSWERS)]
    before, after = (_shares(counts[name], told) for counts in (made.all, made.kept))
    values = {*before, *after}
    shift = sum(abs(after.get(value, 0.0) - before.get(value, 0.0)) for value in values) / 2 if after else 0.0
    chance = _chance(before.values(), made.all[name].total(), made.kept[name].total())
    return Composition(before=before, after=after, shift=round(shift, 4), chance=round(chance, 4))


def _chance(shares: Iterable[float], n: int, m: int) -> float:
    """How far a random choice of m of n samples moves a composition on average.

    The share p of a value is then about normal around p, with the variance p (1 - p) / m * (n - m) / (n - 1); its mean
    distance from p is sqrt(2 / pi) times the deviation, and a composition moves by half the sum of the distances.
    """
    if not 0 < m < n:
        return 0.0
    return sum(math.sqrt(2 / math.pi * p * (1 - p) / m * (n - m) / (n - 1)) for p in shares if p < 1) / 2


def _shares(counts: Counter[str], told: list[str]) -> dict[str, float]:
    total = counts.total()
    if not total:
        return {}
    shares = {value: counts[value] / total for value in told if counts[value]}
    rest = 1.0 - sum(shares.values())
    if rest > 1e-9:
        shares[OTHERS] = shares.get(OTHERS, 0.0) + rest
    return {value: round(share, 4) for value, share in shares.items()}


def _length(answer: str) -> str:
    """Characters, by powers of two."""
    n = max(1, len(answer))
    low = 1 << (n.bit_length() - 1)
    return f"{low} to {2 * low - 1} characters" if low > 1 else "1 character"


def _megapixels(width: int, height: int) -> str:
    power = math.floor(math.log2(max(width * height, 1) / 1e6))
    return f"{2.0**power:g} to {2.0 ** (power + 1):g} megapixels"
