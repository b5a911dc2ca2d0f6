"""The samples of a stage: its row's subsets, pruned where the row says so, in the order of the cursor."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from nvila.components.contracts.errors import DataError
from nvila.components.contracts.recipe.train import Stage
from nvila.components.data.mixture import draw
from nvila.components.data.samples import Sample, read_samples


def stage_samples(stage: Stage, samples: Path, kept: Sequence[Path], seed: int) -> list[Sample]:
    """Samples in training order.

    Args:
        stage: the row of the stage table.
        samples: the sample table of `validate`.
        kept: score tables of `prune`; used when the row is pruned.
        seed: of the order.

    Raises:
        DataError: a subset is empty, has no scores though the row is pruned, or all together do not fill one batch.
    """
    keep = _kept_ids(kept, stage) if stage.pruned else None
    subsets: dict[str, list[Sample]] = {}
    for subset in stage.data:
        source, _, split = subset.partition(".")
        rows = read_samples(samples, split=split, sources=[source])
        if keep is not None and split == "sft":
            rows = [row for row in rows if row.id in keep]
        if not rows:
            raise DataError(f"stage {stage.name} has no samples in {subset}", where=str(samples))
        subsets[subset] = rows
    drawn = draw(subsets, stage.data, seed)
    if len(drawn) < stage.batch:
        raise DataError(
            f"stage {stage.name} has {len(drawn)} samples, which do not fill one batch of {stage.batch}",
            where=str(samples),
            do="Bring more samples, raise the passes in the stage's data, or lower its batch.",
        )
    return drawn


def _kept_ids(tables: Sequence[Path], stage: Stage) -> set[str]:
    """Ids of what stays of the sources that the stage is tuned on; read in batches, a table may have millions of rows.

    Raises:
        DataError: no table has a row of one of them, so that nothing says what stays.
    """
    import pyarrow.parquet as parquet

    ids: set[str] = set()
    unscored = set(stage.tuned_on)
    for table in tables:
        for batch in parquet.ParquetFile(table).iter_batches(columns=["id", "kept"]):
            if unscored:
                unscored -= {sample.partition("/")[0] for sample in batch["id"].to_pylist()}
            ids.update(batch.filter(batch["kept"])["id"].to_pylist())
    if unscored:
        raise DataError(
            f"no scores of {', '.join(sorted(unscored))}, of which stage {stage.name} takes what pruning kept",
            where=", ".join(map(str, tables)) or "no score table",
            do="Run the recipe again, so that the sources are pruned; or leave `pruned` out of the stage.",
        )
    return ids
