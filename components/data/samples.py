"""The sample and label tables: written by `validate`, read by every step that trains, scores or evaluates."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from nvila.components.contracts.digests import is_sha256, medium_sha256
from nvila.components.contracts.errors import DataError
from nvila.components.data.media import Limits, MediaError, inside

if TYPE_CHECKING:
    import pyarrow

Role = Literal["human", "gpt"]
SAMPLES_FILE = "samples.parquet"
LABELS_FILE = "labels.parquet"
QUARANTINE_FILE = "quarantine.jsonl"
_LIMITS = b"nvila.limits"
"""Key in a table's metadata: what its media were allowed to be when `validate` looked at them."""
_DEFAULT = Limits()


@dataclass(frozen=True)
class Turn:
    """One message of a conversation; `text` holds media markers such as `<image>`."""

    role: Role
    text: str


@dataclass(frozen=True)
class Sample:
    """One good record of a source."""

    id: str
    """`source/split/id in the source's file`."""
    source: str
    kind: Literal["image", "video"]
    split: Literal["sft", "captions", "heldout"]
    root: Path
    """Absolute folder of the source."""
    media: tuple[str, ...]
    """Paths relative to `root`, in the order of the markers."""
    conversations: tuple[Turn, ...]
    question: str
    """First human turn without media markers."""
    answer: str
    """First answer."""
    limits: Limits = field(default_factory=Limits)
    """What its media may be: those of the recipe, by which `validate` looked at them."""
    media_sha256: tuple[str | None, ...] = ()
    """Digest of each medium as `validate` read it; what is no digest is not known."""

    @property
    def paths(self) -> list[Path]:
        """Absolute paths of the media, whose bytes are those that were validated; for whoever opens them now.

        Raises:
            MediaError: a path leaves the source's folder, or the bytes behind it are others than `validate` read.
        """
        paths = [inside(self.root, name) for name in self.media]
        return [unchanged(path, sha256) for path, sha256 in zip_longest(paths, self.media_sha256[: len(paths)])]


@dataclass(frozen=True)
class Label:
    """What is to be seen in a training picture, in a box of it, or in one frame of a training clip."""

    source: str
    root: Path
    media: str
    frame: int | None
    """Index of a video's frame; None for pictures."""
    box: tuple[float, float, float, float] | None
    """Left, top, right, bottom as fractions of width and height; None is the whole picture."""
    labels: tuple[str, ...]
    limits: Limits = field(default_factory=Limits)
    """As of a sample."""
    media_sha256: str | None = None
    """Digest of the picture or video as `validate` read it, where it is known."""

    @property
    def path(self) -> Path:
        """Absolute path of the picture or video, whose bytes are those that were validated.

        Raises:
            MediaError: as for `Sample.paths`.
        """
        return unchanged(inside(self.root, self.media), self.media_sha256)


def unchanged(path: Path, sha256: str | None) -> Path:
    """The path of a medium, after a look at its bytes where a digest is given. What is gone is the decoder's to say.

    Raises:
        MediaError: other bytes, or unreadable ones.
    """
    if not is_sha256(sha256):
        return path
    try:
        found = medium_sha256(path)
    except OSError as error:
        raise MediaError("undecodable", f"cannot be read: {error.strerror}", path) from error
    if found is not None and found != sha256:
        raise MediaError("changed", "the medium was changed after its validation; run again to validate it", path)
    return path


def read_samples(
    path: Path,
    *,
    split: str | None = None,
    sources: Collection[str] | None = None,
    ids: Iterable[str] | None = None,
) -> list[Sample]:
    """Samples of a table in its order.

    Args:
        path: the table, `samples.parquet`.
        split: only this split.
        sources: only these sources.
        ids: only these samples; each must be in the table.

    Raises:
        DataError: the table cannot be read, or lacks some of `ids`.
    """
    wanted = None if ids is None else set(ids)
    limits = read_limits(path)
    found = [
        _sample(row, limits)
        for row in _rows(path)
        if (split is None or row["split"] == split)
        and (sources is None or row["source"] in sources)
        and (wanted is None or row["id"] in wanted)
    ]
    if wanted is not None and (lost := wanted - {sample.id for sample in found}):
        raise DataError(f"{len(lost)} samples are not in the table", where=str(path), value=min(lost))
    return found


def sample_batches(
    path: Path, rows: int, *, split: str, sources: Collection[str], columns: Sequence[str] | None = None
) -> Iterator[pyarrow.Table]:
    """The rows of one split of some sources, in the table's order, so many at a time (the last may have fewer).

    The table may be larger than the memory: no more than a few batches of it are held. Of `columns` those are there
    that the table has; None is all.

    Raises:
        DataError: the table cannot be read.
    """
    import pyarrow
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    chosen = (pc.field("split") == split) & pc.field("source").isin(sorted(sources))
    wanted = None if columns is None else {"source", "split", *columns}
    waiting: list[pyarrow.Table] = []
    try:
        with pq.ParquetFile(path) as file:
            names = [name for name in file.schema_arrow.names if wanted is None or name in wanted]
            for batch in file.iter_batches(rows, columns=names):
                waiting.append(pyarrow.Table.from_batches([batch]).filter(chosen))
                if sum(map(len, waiting)) >= rows:
                    joined = pyarrow.concat_tables(waiting)
                    yield joined.slice(0, rows)
                    waiting = [joined.slice(rows)]
    except (OSError, pyarrow.ArrowInvalid) as error:
        raise DataError("not a readable table", where=str(path), value=str(error)) from error
    if any(map(len, waiting)):
        yield pyarrow.concat_tables(waiting)


def samples_of(rows: pyarrow.Table, limits: Limits) -> list[Sample]:
    """The samples of a batch; `limits` is what `read_limits` says of its table."""
    return [_sample(row, limits) for row in rows.to_pylist()]


def read_labels(path: Path, *, sources: Collection[str] | None = None) -> list[Label]:
    """Labels of a table in its order, of all sources or of some.

    Raises:
        DataError: the table cannot be read.
    """
    limits = read_limits(path)
    return [
        Label(
            row["source"],
            Path(row["root"]),
            row["media"],
            row["frame"],
            None if row["box"] is None else tuple(row["box"]),
            tuple(row["labels"]),
            limits,
            row.get("media_sha256"),
        )
        for row in _rows(path)
        if sources is None or row["source"] in sources
    ]


def read_limits(path: Path) -> Limits:
    """What the media of a table may be; the default of a table that does not say it.

    Raises:
        DataError: the table cannot be read.
    """
    import pyarrow
    import pyarrow.parquet as pq

    try:
        told = (pq.read_schema(path).metadata or {}).get(_LIMITS)
        return _DEFAULT if told is None else Limits(**json.loads(told))
    except (OSError, pyarrow.ArrowInvalid, ValueError, TypeError) as error:
        raise DataError("not a readable table", where=str(path), value=str(error)) from error


def write_samples(path: Path, rows: list[dict[str, Any]], limits: Limits = _DEFAULT) -> None:
    """Write rows with the columns of `sample_schema`, and what their media may be."""
    _write(path, rows, sample_schema(), limits)


def write_labels(path: Path, rows: list[dict[str, Any]], limits: Limits = _DEFAULT) -> None:
    """Write rows with the columns of `label_schema`, and what their media may be."""
    _write(path, rows, label_schema(), limits)


def sample_schema() -> pyarrow.Schema:
    """Columns of `samples.parquet`. `fields` is JSON: what else a record says of itself, as far as it is short."""
    import pyarrow as pa

    texts = ("id", "source", "kind", "split", "root")
    more = ("conversations", "question", "answer")
    return pa.schema(
        [
            *((name, pa.string()) for name in texts),
            ("media", pa.list_(pa.string())),
            ("media_sha256", pa.list_(pa.string())),
            *((name, pa.string()) for name in more),
            ("fields", pa.string()),
            ("line", pa.int64()),
        ]
    )


def label_schema() -> pyarrow.Schema:
    """Columns of `labels.parquet`."""
    import pyarrow as pa

    return pa.schema(
        [
            ("source", pa.string()),
            ("root", pa.string()),
            ("media", pa.string()),
            ("frame", pa.int64()),
            ("box", pa.list_(pa.float64())),
            ("labels", pa.list_(pa.string())),
            ("media_sha256", pa.string()),
        ]
    )


def _sample(row: Mapping[str, Any], limits: Limits = _DEFAULT) -> Sample:
    return Sample(
        id=row["id"],
        source=row["source"],
        kind=row["kind"],
        split=row["split"],
        root=Path(row["root"]),
        media=tuple(row["media"]),
        conversations=tuple(Turn(turn["from"], turn["value"]) for turn in json.loads(row["conversations"])),
        question=row["question"],
        answer=row["answer"],
        limits=limits,
        media_sha256=tuple(row.get("media_sha256") or ()),
    )


def _rows(path: Path) -> list[dict[str, Any]]:
    import pyarrow
    import pyarrow.parquet as pq

    try:
        return pq.read_table(path).to_pylist()
    except (OSError, pyarrow.ArrowInvalid) as error:
        raise DataError("not a readable table", where=str(path), value=str(error)) from error


def _write(path: Path, rows: list[dict[str, Any]], schema: pyarrow.Schema, limits: Limits) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = schema.with_metadata({_LIMITS: json.dumps(asdict(limits))})
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), path)
