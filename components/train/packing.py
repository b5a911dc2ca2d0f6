"""Which samples of a global batch go through the model together, and in which rows: arithmetic on their lengths.

The loss is a sum over tokens, so the arrangement changes what a step costs and nothing that it learns.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

Packing = Literal["padded", "grouped", "packed"]
Row = list[int]
"""Samples that lie one behind the other, by their number."""
Pass = list[Row]
"""Rows that go through the model at once."""

PAIR_CPU, PAIR_GPU = 8.0, 2.0
"""What a product inside attention costs, in products of matrices: with a mask it moves more than it multiplies. On a
CPU fitted to rows of 31 to 512 tokens; on a GPU without a kernel for packed rows assumed."""
PASS_CPU, PASS_GPU = 1e9, 1e11
"""What a pass costs whatever is in it, in products: layers are called one by one, weights read, gradients added."""
WORDS = {
    "padded": "rows of one sample, in their order",
    "grouped": "rows of one sample, those of like length together",
    "packed": "rows of several samples",
}


@dataclass(frozen=True)
class Cost:
    """What passes through a decoder cost, in products of numbers."""

    token: float
    """Of a position with the decoder's matrices."""
    pair: float
    """Of two positions of a row that attention looks at together."""
    whole: float
    """Of a pass, whatever is in it."""
    kernel: bool = False
    """Attention knows where samples of a row begin: no pair of two samples costs anything, and one row holds all."""

    @classmethod
    def of(cls, llm: Mapping[str, Any], *, gpu: bool, kernel: bool = False) -> Cost:
        """Of a decoder by its configuration."""
        hidden, layers = int(llm["hidden_size"]), int(llm["num_hidden_layers"])
        keys = hidden * int(llm["num_key_value_heads"]) // int(llm["num_attention_heads"])
        matrices = layers * hidden * (2 * hidden + 2 * keys + 3 * int(llm["intermediate_size"]))
        pair = 1.0 if kernel else PAIR_GPU if gpu else PAIR_CPU
        return cls(matrices, 2 * layers * hidden * pair, PASS_GPU if gpu else PASS_CPU, kernel)

    def rows(self, rows: int, length: int) -> float:
        """Of a pass of so many rows, all as long as the longest."""
        return self.whole + rows * length * (self.token + self.pair * length)

    def flat(self, lengths: Sequence[int]) -> float:
        """Of a pass of samples in one row, with the kernel."""
        return self.whole + sum(n * (self.token + self.pair * n) for n in lengths)


@dataclass(frozen=True)
class Arrangement:
    """The passes of some samples."""

    packing: Packing
    passes: list[Pass]
    cost: float
    costs: Mapping[str, float]
    """Of every packing that was thought of."""
    flat: bool = False
    """Whether the rows of a pass lie in one, for the kernel."""

    @property
    def words(self) -> str:
        """Which, and why."""
        others = {name: cost / self.cost for name, cost in self.costs.items() if name != self.packing}
        why = ", ".join(f"{name} would cost {ratio:.2f} times as much" for name, ratio in others.items())
        how = (
            "one row of several samples, by a kernel that knows where each begins" if self.flat else WORDS[self.packing]
        )
        return f"{self.packing}: {how}" + (f" ({why})" if why else "")


def arrange(lengths: Sequence[int], most: int, limit: int, cost: Cost, packing: str = "auto") -> Arrangement:
    """The passes of samples of these lengths.

    Args:
        lengths: positions of each sample in the decoder, `limit` at most.
        most: rows of a pass; packed rows have `limit` positions at most, so a pass never has more than `most` padded
            samples of the longest kind.
        limit: positions of a row.
        cost: of the decoder on this device.
        packing: one of them, or `auto` for the cheapest.
    """
    wanted = _NAMES if packing == "auto" else (packing,)
    found = {name: _PACKINGS[name](lengths, most, limit, cost) for name in wanted}
    costs = {
        name: _cost(passes, lengths, cost, flat=cost.kernel and name == "packed") for name, passes in found.items()
    }
    best: Any = "packed" if cost.kernel and "packed" in found else min(costs, key=lambda name: costs[name])
    return Arrangement(best, found[best], costs[best], costs, flat=cost.kernel and best == "packed")


def waste(passes: Sequence[Pass], lengths: Sequence[int], *, flat: bool = False) -> float:
    """Share of the positions of all passes that hold no token."""
    held = sum(lengths[sample] for rows in passes for row in rows for sample in row)
    if flat:
        return 0.0
    given = sum(len(rows) * max(_length(row, lengths) for row in rows) for rows in passes)
    return 1 - held / given if given else 0.0


def first_fit(lengths: Sequence[int], capacity: int) -> list[Row]:
    """Rows of at most `capacity` positions, by first fit of the longest first; a sample longer than that is alone."""
    rows: list[Row] = []
    room: list[int] = []
    for sample in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        length = lengths[sample]
        at = next((row for row, left in enumerate(room) if left >= length), None)
        if at is None:
            rows.append([sample])
            room.append(capacity - length)
        else:
            rows[at].append(sample)
            room[at] -= length
    return rows


def _padded(lengths: Sequence[int], most: int, limit: int, cost: Cost) -> list[Pass]:
    rows = [[sample] for sample in range(len(lengths))]
    return [rows[i : i + most] for i in range(0, len(rows), most)]


def _grouped(lengths: Sequence[int], most: int, limit: int, cost: Cost) -> list[Pass]:
    return _cut([[sample] for sample in range(len(lengths))], lengths, most, cost)


def _packed(lengths: Sequence[int], most: int, limit: int, cost: Cost) -> list[Pass]:
    """With the kernel rows up to the limit; without, rows as long as it pays, from the longest sample's on."""
    if cost.kernel:
        rows = first_fit(lengths, limit)
        return [rows[i : i + most] for i in range(0, len(rows), most)]
    capacity = max(lengths)
    best = _cut(first_fit(lengths, capacity), lengths, most, cost)
    while capacity < limit:
        capacity = min(2 * capacity, limit)
        longer = _cut(first_fit(lengths, capacity), lengths, most, cost)
        if _cost(longer, lengths, cost) >= _cost(best, lengths, cost):
            break
        best = longer
    return best


_PACKINGS = {"padded": _padded, "grouped": _grouped, "packed": _packed}
_NAMES = tuple(_PACKINGS)


def _cut(rows: list[Row], lengths: Sequence[int], most: int, cost: Cost) -> list[Pass]:
    """Rows of like length in passes of at most `most`, where they cost least together."""
    import numpy

    rows = sorted(rows, key=lambda row: -_length(row, lengths))
    each = numpy.array([_length(row, lengths) for row in rows], dtype=float)
    each = each * (cost.token + cost.pair * each)  # of a row of a pass that begins with it
    if len(rows) <= most and cost.whole + len(rows) * each[0] <= 2 * cost.whole + each.sum():
        return [rows]  # what a second pass costs is more than it could save
    best, begins = numpy.zeros(len(rows) + 1), [0] * (len(rows) + 1)
    for end in range(1, len(rows) + 1):
        first = numpy.arange(max(0, end - most), end)
        costs = best[first] + cost.whole + (end - first) * each[first]
        choice = int(costs.argmin())
        best[end], begins[end] = costs[choice], int(first[choice])
    passes, end = [], len(rows)
    while end:
        passes.append(rows[begins[end] : end])
        end = begins[end]
    return passes[::-1]


def _cost(passes: Sequence[Pass], lengths: Sequence[int], cost: Cost, *, flat: bool = False) -> float:
    if flat:
        return sum(cost.flat([lengths[sample] for row in rows for sample in row]) for rows in passes)
    return sum(cost.rows(len(rows), max(_length(row, lengths) for row in rows)) for rows in passes)


def _length(row: Row, lengths: Sequence[int]) -> int:
    return sum(lengths[sample] for sample in row)
