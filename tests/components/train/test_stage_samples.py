"""The sample table as processes share it."""

from __future__ import annotations

import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from nvila.components.contracts.errors import DataError
from nvila.components.contracts.recipe.train import Stage
from nvila.components.data import mapped as mapping
from nvila.components.data.mapped import mapped
from nvila.components.data.mixture import draw
from nvila.components.data.samples import read_samples, write_samples
from nvila.components.train.data import stage_samples

ROWS = 20_000


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("many") / "samples.parquet"
    row: dict[str, Any] = {"kind": "image", "root": "/r", "media_sha256": [""], "question": "q", "answer": "a"}
    row |= {"conversations": '[{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]'}
    rows = [
        row | {"id": f"s/{split}/{n}", "source": "s", "split": split, "media": [f"{n}.png"], "line": n}
        for n in range(ROWS)
        for split in [("sft", "captions", "heldout")[n % 3]]
    ]
    write_samples(path, rows)
    return path


def stage(**data: float) -> Stage:
    wanted = {f"s.{split}": passes for split, passes in data.items()}
    return Stage(name="x", trainable=["llm"], learning_rate=1, data=wanted, batch=8)


def test_samples_come_in_the_order_that_was_drawn(table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another order than the cursor counts in is another stage after a resume; and rows lie in several batches."""
    monkeypatch.setattr(mapping, "BATCH_ROWS", 900)
    row = stage(sft=0.5, captions=2)
    found = stage_samples(row, table, [], 3, tmp_path)
    subsets = {name: read_samples(table, split=name.partition(".")[2]) for name in row.data}
    wanted = draw(subsets, row.data, 3)
    assert found.ids == [sample.id for sample in wanted]
    assert list(found[5:40]) == wanted[5:40] and found[-1] == wanted[-1]
    assert found.distinct == len({sample.id for sample in wanted})


def test_what_a_process_keeps_of_a_sample_is_its_row_number(table: Path, tmp_path: Path) -> None:
    """2,769 bytes a sample in each of eight processes are 220 GB of ten million."""
    stage_samples(stage(sft=1), table, [], 0, tmp_path)  # imports, and lays the table out
    tracemalloc.start()
    samples = stage_samples(stage(sft=1, captions=1), table, [], 0, tmp_path)
    kept, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert kept < 16 * len(samples) and most < 200 * len(samples)


def test_processes_share_one_file_and_another_table_is_another(table: Path, tmp_path: Path) -> None:
    """A table laid out by an earlier attempt must not stand for one that was written since."""
    assert mapped(table, tmp_path)._batches[0].equals(mapped(table, tmp_path)._batches[0])
    assert len(list(tmp_path.glob("*.arrow"))) == 1
    other = tmp_path / "samples.parquet"
    write_samples(other, [])
    assert len(mapped(other, tmp_path)) == 0 and len(list(tmp_path.glob("*.arrow"))) == 2
    (tmp_path / "bad.parquet").write_bytes(b"no table")
    for name in ("bad.parquet", "none.parquet"):
        with pytest.raises(DataError, match="not a readable table"):
            mapped(tmp_path / name, tmp_path)
    assert not list(tmp_path.glob("*.partial"))
