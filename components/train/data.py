"""The samples of a stage: its row's subsets, pruned where the row says so, in the order of the cursor."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, overload

from nvila.components.contracts.errors import DataError
from nvila.components.contracts.recipe.train import Stage
from nvila.components.data.limits import Limits
from nvila.components.data.mapped import Mapped, mapped
from nvila.components.data.mixture import draw
from nvila.components.data.samples import Sample, read_limits, samples_of

if TYPE_CHECKING:
    import numpy
    import pyarrow

INDEX = "index"
"""Folder beside the checkpoints of an unfinished stage: the table as processes share it."""


class StageSamples(Sequence[Sample]):
    """Samples in training order: row numbers of a mapped table, 4 bytes each. A sample is made when it is asked for."""

    def __init__(self, table: Mapped, limits: Limits, rows: numpy.ndarray) -> None:
        self._table, self._limits, self._rows = table, limits, rows

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, index: int) -> Sample: ...

    @overload
    def __getitem__(self, index: slice) -> StageSamples: ...

    def __getitem__(self, index: int | slice) -> Sample | StageSamples:
        if isinstance(index, slice):
            return StageSamples(self._table, self._limits, self._rows[index])
        return samples_of(self._table.row(int(self._rows[index])), self._limits)[0]

    @property
    def ids(self) -> list[str]:
        """The samples' ids, for a slice of them."""
        return [self._table.row(int(row))["id"][0].as_py() for row in self._rows]

    @property
    def distinct(self) -> int:
        """How many different samples there are."""
        import numpy

        return len(numpy.unique(self._rows))

    def share(self, batch: int, rank: int, world: int) -> StageSamples:
        """One process's samples: of each global batch its contiguous slice, so the batch does not depend on `world`.

        What does not fill a global batch is left out.
        """
        whole = self._rows[: len(self._rows) // batch * batch].reshape(-1, world, batch // world)
        return StageSamples(self._table, self._limits, whole[:, rank].reshape(-1))


def stage_samples(stage: Stage, samples: Path, kept: Sequence[Path], seed: int, folder: Path) -> StageSamples:
    """Samples in training order.

    Args:
        stage: the row of the stage table.
        samples: the sample table of `validate`.
        kept: score tables of `prune`; used when the row is pruned.
        seed: of the order.
        folder: where the table is laid out for all processes of the machine.

    Raises:
        DataError: a subset is empty, has no scores though the row is pruned, or all together do not fill one batch.
    """
    import numpy

    table, limits = mapped(samples, folder), read_limits(samples)
    keep = _kept_ids(kept, stage) if stage.pruned else None
    subsets = {subset: _rows(table, subset, keep) for subset in stage.data}
    for subset, rows in subsets.items():
        if not rows:
            raise DataError(f"stage {stage.name} has no samples in {subset}", where=str(samples))
    drawn = draw(subsets, stage.data, seed)
    if len(drawn) < stage.batch:
        raise DataError(
            f"stage {stage.name} has {len(drawn)} samples, which do not fill one batch of {stage.batch}",
            where=str(samples),
            do="Bring more samples, raise the passes in the stage's data, or lower its batch.",
        )
    return StageSamples(table, limits, numpy.array(drawn, dtype=numpy.int32))


def _rows(table: Mapped, subset: str, keep: pyarrow.Array | None) -> list[int]:
    """Row numbers of a subset, in the table's order; of an `sft` split what is in `keep`, where something is pruned."""
    import numpy
    import pyarrow.compute as pc

    source, _, split = subset.partition(".")
    wanted = pc.and_(pc.equal(table.column("source"), source), pc.equal(table.column("split"), split))
    if keep is not None and split == "sft":
        wanted = pc.and_(wanted, pc.is_in(table.column("id"), value_set=keep))
    found: list[int] = numpy.flatnonzero(wanted.to_numpy()).tolist()
    return found


def _kept_ids(tables: Sequence[Path], stage: Stage) -> pyarrow.Array:
    """Ids of what stays of the sources that the stage is tuned on; read in batches, a table may have millions of rows.

    Raises:
        DataError: no table has a row of one of them, so that nothing says what stays.
    """
    import pyarrow
    import pyarrow.parquet as parquet

    kept: list[pyarrow.Array] = []
    unscored = set(stage.tuned_on)
    for table in tables:
        for batch in parquet.ParquetFile(table).iter_batches(columns=["id", "kept"]):
            if unscored:
                unscored -= {sample.partition("/")[0] for sample in batch["id"].to_pylist()}
            kept.append(batch.filter(batch["kept"])["id"])
    if unscored:
        raise DataError(
            f"no scores of {', '.join(sorted(unscored))}, of which stage {stage.name} takes what pruning kept",
            where=", ".join(map(str, tables)) or "no score table",
            do="Run the recipe again, so that the sources are pruned; or leave `pruned` out of the stage.",
        )
    return pyarrow.concat_arrays(kept)
