"""What a method keeps at a ratio, read off the score tables of `prune`: no model is asked again."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nvila.components.contracts.manifest import Manifest
from nvila.components.contracts.recipe.prune import JUDGED, PruneSettings
from nvila.components.contracts.results.model import Pruning
from nvila.pipelines.ablate.cases import ALL

if TYPE_CHECKING:
    import pyarrow

    from nvila.components.prune.decide import Columns

SCORES_FILE = "scores.parquet"


def kept_by(scores: Manifest, method: str, ratio: float, score: str, seed: int) -> dict[str, Any]:
    """Columns id, source, kept of the samples in a score table.

    Args:
        scores: of a prune step, whose table holds what every method needs.
        method: `ALL` keeps everything that can be used.
        ratio: share of each group that stays.
        score: `sum` or `mean` of losses over answer tokens.
        seed: of random choices.
    """
    import pyarrow.parquet as parquet

    from nvila.components.prune.decide import decide
    from nvila.components.prune.step import believed

    rows = parquet.read_table(scores.path(SCORES_FILE))
    known: dict[str, Any] = {name: rows.column(name).to_pylist() for name in ("id", "source")}
    if method == ALL or not len(rows):
        return known | {"kept": [True] * len(rows)}
    asked = PruneSettings.model_validate(
        # As many samples as by chance, whatever the method: what is not believed is chosen at random.
        {"method": method, "keep_ratio": ratio, "score": score, "untrusted": "random"}
    )
    trusted = believed(scores.told(Pruning).judged, asked.method) if asked.method in JUDGED else set()
    return known | {"kept": decide(_columns(rows), trusted, asked, seed).kept.tolist()}


def write(columns: Mapping[str, Any], path: Path) -> None:
    """A score table as the training stages read it."""
    import pyarrow
    import pyarrow.parquet as parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    schema = pyarrow.schema([("id", pyarrow.string()), ("source", pyarrow.string()), ("kept", pyarrow.bool_())])
    parquet.write_table(pyarrow.Table.from_pydict(dict(columns), schema=schema), path)


def share_dropped(columns: Mapping[str, Any], ids: Iterable[str]) -> dict[str, tuple[int, int]]:
    """Of the samples `ids`, by source: how many do not stay, and how many there are."""
    wanted, found = set(ids), dict[str, tuple[int, int]]()
    for one, source, kept in zip(columns["id"], columns["source"], columns["kept"], strict=True):
        if one in wanted:
            dropped, n = found.get(source, (0, 0))
            found[source] = dropped + (not kept), n + 1
    return found


def _columns(rows: pyarrow.Table) -> Columns:
    import numpy as np

    from nvila.components.prune.decide import Columns, ties

    codes: dict[str, Any] = {}
    names: dict[str, list[str]] = {}
    for column in ("source", "group", "kind"):
        values = rows.column(column).to_pylist()
        names[column] = list(dict.fromkeys(values))
        place = {name: number for number, name in enumerate(names[column])}
        codes[column] = np.array([place[value] for value in values], dtype=np.int32)
    clusters = rows.column("cluster")
    return Columns(
        ties=ties(rows["id"].to_pylist()),
        **codes,
        sources=names["source"],
        groups=names["group"],
        kinds=names["kind"],
        loss={name: _floats(rows, f"loss_{name}") for name in ("small", "large", "blank")},
        tokens={name: np.nan_to_num(_floats(rows, f"tokens_{name}")).astype(np.int32) for name in ("small", "large")},
        cluster=None if clusters.null_count == len(rows) else np.array(clusters.fill_null(-1), dtype=np.int32),
    )


def _floats(rows: pyarrow.Table, name: str) -> Any:
    import numpy as np

    return np.array(rows.column(name).to_pylist(), dtype=np.float64)
