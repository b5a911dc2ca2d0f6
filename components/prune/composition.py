"""What a source is made of before and after pruning, and whether it has moved farther than chance and recipe allow."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any
from zlib import crc32

from nvila.components.contracts.results.model import Composition
from nvila.components.data.media import Limits, MediaError, inside, size
from nvila.components.metrics.accuracy import normal_form
from nvila.components.prune.groups import answer_kind

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
class Makeup:
    """Counts of one source."""

    all: dict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))
    """By respect and value, of all samples."""
    kept: dict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))
    sizes: dict[str, tuple[int, tuple[int, int]]] = field(default_factory=dict)
    """By path of a medium: its place by digest, and how many samples show it, all and kept."""
    n: int = 0
    m: int = 0
    """Of them kept."""


def makeup(rows: Iterable[pyarrow.Table], kept: np.ndarray, limits: Limits) -> dict[str, dict[str, Composition]]:
    """By source and respect (`RESPECTS`).

    Args:
        rows: the samples, batch by batch: source, kind, root, media, answer.
        kept: (n,) bool, which of them stay, in the same order.
        limits: what their media may be.
    """
    found: dict[str, Makeup] = defaultdict(Makeup)
    kinds: dict[str, Any] = {}
    at = 0
    for batch in rows:
        columns = [batch.column(name).to_pylist() for name in ("source", "kind", "root", "media", "answer")]
        for row in zip(*columns, kept[at : at + len(batch)].tolist(), strict=True):
            kinds[row[0]] = row[1]
            _count(found[row[0]], *row[2:])
        at += len(batch)
    for source, made in found.items():
        _measure(made, kinds[source], limits)
    return {source: {name: _composition(made, name) for name in RESPECTS} for source, made in sorted(found.items())}


def moved(sources: Mapping[str, Mapping[str, Composition]], kept: Mapping[str, int], limit: float) -> list[str]:
    """In words, what moved by more than `limit` beyond what a random choice of the same size moves.

    A random choice of m samples moves a share p by about sqrt(2 p (1 - p) / (pi m)) on average, and the composition by
    half the sum of these.

    Args:
        sources: compositions by source and respect.
        kept: how many samples of each source stay.
        limit: share of samples.
    """
    found = []
    for source, respects in sources.items():
        for name, made in respects.items():
            chance = (
                sum(math.sqrt(2 * p * (1 - p) / (math.pi * max(kept[source], 1))) for p in made.before.values()) / 2
            )
            if made.shift <= limit + chance:
                continue
            most = sorted(made.before | made.after, key=lambda v: -abs(made.after.get(v, 0) - made.before.get(v, 0)))[
                :3
            ]
            told = ", ".join(f"{v} {made.before.get(v, 0):.2f} -> {made.after.get(v, 0):.2f}" for v in most)
            found.append(f"{source}: {name} moved by {made.shift:.2f} (limit {limit:.2f}): {told}")
    return found


def _count(made: Makeup, root: str, media: list[str], answer: str, stays: bool) -> None:
    said = normal_form(answer)
    values = {"answers": said, "answer kinds": answer_kind(answer), "answer lengths": _length(said)}
    for counts in (made.all, made.kept) if stays else (made.all,):
        for name, value in values.items():
            counts[name][value] += 1
        if len(counts["answers"]) > COUNTED:
            few = Counter(dict(counts["answers"].most_common(COUNTED // 2)))
            few[OTHERS] += counts["answers"].total() - few.total()
            counts["answers"] = few
    for name in media[:1]:
        path = f"{root}\0{name}"
        place, (one, two) = made.sizes.get(path, (crc32(path.encode()), (0, 0)))
        made.sizes[path] = (place, (one + 1, two + stays))
    if len(made.sizes) > 2 * MEASURED_MEDIA:
        made.sizes = dict(sorted(made.sizes.items(), key=lambda item: item[1][0])[:MEASURED_MEDIA])
    made.n, made.m = made.n + 1, made.m + stays


def _measure(made: Makeup, kind: Any, limits: Limits) -> None:
    """Count the resolutions of the chosen media by the samples that show them."""
    chosen = sorted(made.sizes.items(), key=lambda item: item[1][0])[:MEASURED_MEDIA]
    known = {path: _size(path, kind, limits) for path, _ in chosen}
    exact = len(set(known.values())) <= EXACT_SIZES
    for path, (_, (one, two)) in chosen:
        found = known[path]
        value = "unknown" if found is None else f"{found[0]}x{found[1]}" if exact else _megapixels(*found)
        made.all["resolutions"][value] += one
        made.kept["resolutions"][value] += two


def _size(path: str, kind: Any, limits: Limits) -> tuple[int, int] | None:
    root, _, name = path.partition("\0")
    try:
        return size(inside(Path(root), name), kind, limits)
    except (MediaError, OSError):
        return None


def _composition(made: Makeup, name: str) -> Composition:
    told = [value for value, _ in made.all[name].most_common(ANSWERS)]
    before, after = (_shares(counts[name], told) for counts in (made.all, made.kept))
    values = {*before, *after}
    shift = sum(abs(after.get(value, 0.0) - before.get(value, 0.0)) for value in values) / 2 if after else 0.0
    return Composition(before=before, after=after, shift=round(shift, 4))


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
