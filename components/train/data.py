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
        DataError: a subset is empty, or all together do not fill one batch.
    """
    keep = _kept_ids(kept) if stage.pruned else None
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


def _kept_ids(tables: Sequence[Path]) -> set[str]:
    import pyarrow.parquet as parquet

    ids: set[str] = set()
    for table in tables:
        rows = parquet.read_table(table, columns=["id", "kept"]).to_pydict()
        ids.update(i for i, keep in zip(rows["id"], rows["kept"], strict=True) if keep)
    return ids
