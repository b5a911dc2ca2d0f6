"""What each method keeps, read off one score table."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet as parquet
import pytest

from nvila.components.contracts.manifest import Manifest, describe_files
from nvila.components.contracts.results.model import Judged, Pruning
from nvila.components.prune.table import SCHEMA
from nvila.pipelines.ablate.cases import ALL, METHODS
from nvila.pipelines.ablate.subset import kept_by, share_dropped, write

N = 200


def _judged(trusted: bool) -> Judged:
    against = {"small": 0.5, "blank": 0.4, "question_only": 0.3} if trusted else {"small": -0.1, "question_only": 0.1}
    return Judged(n=100, loss={}, accuracy={}, against=against, trusted=trusted, why="")


@pytest.fixture
def scores(tmp_path: Path) -> Manifest:
    """Two groups; of the samples' kinds, colours are believed and counts are not."""
    rng = np.random.default_rng(0)
    rows: dict[str, Any] = dict.fromkeys(SCHEMA, [None] * N) | {
        "id": [f"s/sft/{n:04}" for n in range(N)],
        "source": ["s"] * N,
        "group": [f"s/{n % 2}" for n in range(N)],
        "kind": ["colour" if n % 4 < 2 else "count" for n in range(N)],
        "cluster": (np.arange(N) % 5).tolist(),
        "kept": [True] * N,
    }
    for name in ("small", "large", "blank"):
        rows[f"loss_{name}"] = rng.random(N).tolist()
    rows |= {f"tokens_{name}": [1] * N for name in ("small", "large")}
    kinds = {
        "string": pyarrow.string(),
        "float64": pyarrow.float64(),
        "int32": pyarrow.int32(),
        "bool": pyarrow.bool_(),
    }
    schema = pyarrow.schema([(name, kinds[kind]) for name, kind in SCHEMA.items()])
    parquet.write_table(pyarrow.Table.from_pydict(rows, schema=schema), tmp_path / "scores.parquet")
    result = Pruning(sources={}, judged={"colour": _judged(True), "count": _judged(False)}, method="deltaloss")
    files = describe_files(tmp_path)
    return Manifest(step="prune-image", key="k", kind="dataset", files=files, folder=str(tmp_path), result=result)


@pytest.mark.parametrize("ratio", [0.5, 0.3, 0.1])
def test_every_method_keeps_as_many_as_chance(scores: Manifest, ratio: float) -> None:
    """A method that kept its unbelieved groups whole would be compared with chance on twice the samples."""
    kept = {method: sum(kept_by(scores, method, ratio, "sum", 0)["kept"]) for method in METHODS}
    assert max(kept.values()) - min(kept.values()) <= 4 and kept["random"] == ratio * N


def test_deltaloss_ranks_what_is_believed_and_draws_the_rest(scores: Manifest) -> None:
    """Chance in the place of scores that mean nothing, and nowhere else."""
    rows = parquet.read_table(scores.path("scores.parquet")).to_pylist()
    first, second = (kept_by(scores, "deltaloss", 0.5, "sum", seed)["kept"] for seed in (0, 1))
    for group in ("s/0", "s/1"):
        mine = [n for n, row in enumerate(rows) if row["kind"] == "colour" and row["group"] == group]
        delta = {n: rows[n]["loss_small"] - rows[n]["loss_large"] for n in mine}
        best = sorted(mine, key=lambda n: -delta[n])[: len(mine) // 2]
        assert [n for n in mine if first[n]] == sorted(best)
    assert first != second and all(
        a == b for a, b, row in zip(first, second, rows, strict=True) if row["kind"] == "colour"
    )


def test_clusters_are_kept_alike(scores: Manifest) -> None:
    """Uniform over clusters is what the baseline is."""
    rows = parquet.read_table(scores.path("scores.parquet")).to_pylist()
    kept = kept_by(scores, "clusters", 0.3, "sum", 0)["kept"]
    counts = Counter((row["group"], row["cluster"]) for row, stays in zip(rows, kept, strict=True) if stays)
    assert set(counts.values()) == {6}


def test_all_is_all_and_the_stages_can_read_it(scores: Manifest, tmp_path: Path) -> None:
    """What is written is what `train` reads: id, source, kept."""
    columns = kept_by(scores, ALL, 1.0, "sum", 0)
    write(columns, tmp_path / "kept" / "scores.parquet")
    read = parquet.read_table(tmp_path / "kept" / "scores.parquet").to_pydict()
    assert read == {name: columns[name] for name in ("id", "source", "kept")} and all(read["kept"])


def test_the_share_of_spoilt_samples_that_goes_is_counted_by_source() -> None:
    """The figure that tells whether a method finds wrong answers."""
    columns = {"id": ["a/1", "a/2", "b/1", "b/2"], "source": ["a", "a", "b", "b"], "kept": [True, False, False, False]}
    assert share_dropped(columns, ["a/1", "a/2", "b/1"]) == {"a": (1, 2), "b": (1, 1)}
