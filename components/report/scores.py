"""Reads tables of scores and samples for the report, a stretch of rows at a time: they may have ten million."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nvila.components.contracts.errors import DataError

if TYPE_CHECKING:
    import numpy
    import pyarrow

    Array = numpy.ndarray[Any, Any]

STRETCH_ROWS = 1 << 16
STREAM_BYTES = 1 << 20
"""Of a column that is read ahead; without it pyarrow reads the whole column of a row group."""
HELD = 1 << 15
"""Scores of a source that are looked at for where its histogram begins and ends."""
BINS = 36
LARGEST_SCORE = 1e12
"""Beyond it a score is no loss in nats, but a fault, and has no place on the axis."""


@dataclass(frozen=True)
class Histogram:
    """How many samples have which score. Tails beyond 0.5% on either side share the end bins."""

    low: float
    high: float
    kept: list[int]
    dropped: list[int]


def histograms(path: Path, sources: Collection[str], kinds: Collection[str]) -> dict[str, Histogram]:
    """Scores of each source's samples of these kinds of question; no entry where none has a score that is a number.

    Raises:
        DataError: the table cannot be read, or is of another version.
    """
    import numpy

    seen: dict[str, _Thinned] = {}
    for source, score, _ in _scored(path, sources, kinds):
        seen.setdefault(source, _Thinned()).add(score)
    ends = {source: some.ends() for source, some in seen.items()}
    counts = {source: numpy.zeros((2, BINS), numpy.int64) for source in ends}
    for source, score, kept in _scored(path, sources, kinds):
        low, high = ends[source]
        at = numpy.clip((score - low) / (high - low) * BINS, 0, BINS - 1).astype(numpy.int64)
        for row, chosen in enumerate((kept, ~kept)):
            counts[source][row] += numpy.bincount(at[chosen], minlength=BINS)
    return {source: Histogram(*ends[source], *counts[source].tolist()) for source in sources if source in ends}


def find(path: Path, ids: Collection[str], columns: Sequence[str]) -> dict[str, dict[str, Any]]:
    """The rows with these ids, by id, as far as they are there; of the columns those that the table has.

    Raises:
        DataError: the table cannot be read, or has no ids.
    """
    import pyarrow
    import pyarrow.compute as compute

    wanted = pyarrow.array(sorted(ids), pyarrow.string())
    found: dict[str, dict[str, Any]] = {}
    with _reading(path):
        for rows in _stretches(path, ["id", *columns]):
            if len(found) == len(wanted):
                break
            mine = rows.filter(compute.is_in(rows["id"], value_set=wanted))
            found |= {row["id"]: row for row in mine.to_pylist()}
    return found


class _Thinned:
    """Every so many of the values it is shown, so that it never holds more than `2 * HELD`."""

    def __init__(self) -> None:
        self._parts: list[Array] = []
        self._every = 1
        self._seen = 0

    def add(self, values: Array) -> None:
        import numpy

        self._parts.append(values[-self._seen % self._every :: self._every])
        self._seen += len(values)
        while sum(map(len, self._parts)) > 2 * HELD:
            self._parts = [numpy.concatenate(self._parts)[::2]]
            self._every *= 2

    def ends(self) -> tuple[float, float]:
        """Where the middle 99% begin and end; never the same."""
        import numpy

        values = numpy.sort(numpy.concatenate(self._parts))
        low, high = float(values[len(values) // 200]), float(values[-1 - len(values) // 200])
        return (low, high) if high - low > 1e-9 else (low - 0.5, high + 0.5)


def _scored(path: Path, sources: Collection[str], kinds: Collection[str]) -> Iterator[tuple[str, Array, Array]]:
    """Source, scores and whether they stay, a stretch of one source at a time; no stretch is empty."""
    import numpy
    import pyarrow
    import pyarrow.compute as compute

    among = pyarrow.array(sorted(kinds), pyarrow.string())
    with _reading(path):
        for rows in _stretches(path, ["source", "kind", "score", "kept"]):
            chosen = rows.filter(compute.is_in(rows["kind"], value_set=among))
            source = chosen["source"].dictionary_encode()
            codes = source.indices.fill_null(-1).to_numpy(zero_copy_only=False)
            score = chosen["score"].cast(pyarrow.float64()).to_numpy(zero_copy_only=False)
            kept = chosen["kept"].cast(pyarrow.bool_()).fill_null(False).to_numpy(zero_copy_only=False)
            usable = numpy.abs(score) < LARGEST_SCORE  # not of what is no number
            for code, name in enumerate(source.dictionary.to_pylist()):
                mine = usable & (codes == code)
                if name in sources and mine.any():
                    yield name, score[mine], kept[mine]


def _stretches(path: Path, columns: Sequence[str]) -> Iterator[pyarrow.RecordBatch]:
    import pyarrow.parquet as parquet

    with parquet.ParquetFile(path, buffer_size=STREAM_BYTES) as table:
        yield from table.iter_batches(STRETCH_ROWS, columns=list(columns))


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Turns what pyarrow raises of a table that is damaged, or not what we expect, into a `DataError`."""
    import pyarrow

    try:
        yield
    except (OSError, ValueError, KeyError, pyarrow.ArrowException) as error:
        raise DataError("not a readable table", where=str(path), value=str(error)) from error
