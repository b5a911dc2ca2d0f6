"""A sample table as a file that processes of a machine map into memory: its pages are shared, and none is their own."""

from __future__ import annotations

import uuid
from bisect import bisect_right
from pathlib import Path
from typing import TYPE_CHECKING

from nvila.components.contracts.errors import DataError
from nvila.components.contracts.locks import alone

if TYPE_CHECKING:
    import pyarrow

BATCH_ROWS = 16_384
"""Rows that are in memory while the file is written."""


class Mapped:
    """Rows of an Arrow file, made when they are asked for. A forked process reads on in the same pages."""

    def __init__(self, path: Path) -> None:
        import pyarrow.ipc

        reader = pyarrow.ipc.open_file(pyarrow.memory_map(str(path)))
        self._batches = [reader.get_batch(i) for i in range(reader.num_record_batches)]
        self._starts = [0]
        for batch in self._batches:
            self._starts.append(self._starts[-1] + batch.num_rows)

    def __len__(self) -> int:
        return self._starts[-1]

    def row(self, number: int) -> pyarrow.RecordBatch:
        """One row by its place in the table."""
        at = bisect_right(self._starts, number) - 1
        return self._batches[at].slice(number - self._starts[at], 1)

    def column(self, name: str) -> pyarrow.ChunkedArray:
        """A whole column, in place."""
        import pyarrow

        return pyarrow.chunked_array([batch.column(name) for batch in self._batches], self._type(name))

    def _type(self, name: str) -> pyarrow.DataType | None:
        import pyarrow

        return self._batches[0].schema.field(name).type if self._batches else pyarrow.string()


def mapped(table: Path, folder: Path) -> Mapped:
    """A parquet table, uncompressed in `folder` by the first process of the machine that asks for it there.

    Raises:
        DataError: the table cannot be read.
        OSError: the folder takes no more.
    """
    import pyarrow

    try:
        state = table.stat()
        path = folder / f"{table.stem}-{state.st_size}-{state.st_mtime_ns}.arrow"
        folder.mkdir(parents=True, exist_ok=True)
        with alone(folder / "lock", f"{table.name} is being laid out"):
            if not path.exists():
                _write(table, path)
        return Mapped(path)
    except (FileNotFoundError, pyarrow.ArrowInvalid) as error:
        raise DataError("not a readable table", where=str(table), value=str(error)) from error


def _write(table: Path, path: Path) -> None:
    import pyarrow.ipc
    import pyarrow.parquet

    partial = path.with_name(f"{uuid.uuid4().hex[:12]}.partial")
    try:
        with pyarrow.parquet.ParquetFile(table) as file, pyarrow.ipc.new_file(partial, file.schema_arrow) as writer:
            for batch in file.iter_batches(BATCH_ROWS):
                writer.write_batch(batch)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
