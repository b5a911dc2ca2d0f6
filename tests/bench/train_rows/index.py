"""What a process keeps of a stage's samples, beside a list of them; and padding of packed rows beside padded ones."""

from __future__ import annotations

import json
import math
import random
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from nvila.components.train.packing import Cost, arrange, waste

ROWS, PART = 1_000_000, 50_000
SEED, SAMPLES, LIMIT, MICRO_BATCH = 0, 256, 8192, 4
DECODER = {"hidden_size": 3584, "num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4}
DECODER |= {"intermediate_size": 18944}
Row = tuple[str, str, float, float, str, float | None]


def rows() -> Iterator[Row]:
    """Bytes a sample, and shares of positions without a token."""
    with tempfile.TemporaryDirectory() as folder:
        table = Path(folder, "samples.parquet")
        _write(table)
        ours, listed = (_own_bytes(how, table) for how in ("index", "list"))
    yield f"index of {ROWS:,} samples", "bytes a sample", listed, ours, "a list of samples", listed / 200
    rng, spread = random.Random(SEED), math.log(4000 / 700) / 1.6449
    lengths = [min(LIMIT, max(8, round(rng.lognormvariate(math.log(700), spread)))) for _ in range(SAMPLES)]
    cost = Cost.of(DECODER, gpu=True)
    padded, packed = (
        waste(arrange(lengths, MICRO_BATCH, LIMIT, cost, how).passes, lengths) for how in ("padded", "packed")
    )
    work = f"padding, micro batch {MICRO_BATCH}, log-normal lengths (median 700, p95 4,000, limit {LIMIT}, seed {SEED})"
    yield work, "share", padded, packed, "rows of one sample, in their order", padded / 0.04


def _write(path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    from nvila.components.data.samples import sample_schema

    turns = [{"from": "human", "value": "<image>\nWhat is to be seen here?"}, {"from": "gpt", "value": "A plate"}]
    always = {"source": "s", "kind": "image", "split": "sft", "root": "/data/s", "conversations": json.dumps(turns)}
    always |= {"question": "What is to be seen here?", "answer": "A plate", "fields": "{}"}
    with pyarrow.parquet.ParquetWriter(path, sample_schema()) as writer:
        for first in range(0, ROWS, PART):
            some = range(first, first + PART)
            columns = {name: [text] * PART for name, text in always.items()}
            columns |= {"id": [f"s/sft/{n}" for n in some], "line": list(some)}
            columns |= {"media": [[f"{n}.jpg"] for n in some], "media_sha256": [["0" * 64]] * PART}
            writer.write_table(pyarrow.table(columns, schema=sample_schema()))


def _own_bytes(how: str, table: Path) -> float:
    """Of each sample, in a process of its own: memory that no file stands behind."""
    done = subprocess.run([sys.executable, __file__, how, str(table)], capture_output=True, text=True, check=True)
    return float(done.stdout)


def main(how: str, table: Path) -> None:
    """Print the bytes a sample that this process has more of, once it has read the table."""
    import gc

    import numpy  # noqa: F401
    import pyarrow.compute
    import pyarrow.ipc
    import pyarrow.parquet  # noqa: F401

    from nvila.components.contracts.recipe.train import Stage
    from nvila.components.data.samples import read_samples
    from nvila.components.train.data import stage_samples

    stage = Stage(name="x", trainable=["llm"], learning_rate=1, data={"s.sft": 1}, batch=8)
    before = _anonymous()
    samples = stage_samples(stage, table, [], 0, table.parent) if how == "index" else read_samples(table)
    gc.collect()
    print((_anonymous() - before) / len(samples))


def _anonymous() -> int:
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("Anonymous")) * 1024


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
