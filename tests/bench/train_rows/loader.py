"""Share of its time that a training process waits for samples, by the stage's own meter (`loader_wait`), in stages 4
and 5 of the recipe `tiny`; and the same where it makes them ready itself. By hand:

    .venv/bin/python tests/bench/train_rows/loader.py

What is waited for includes the arranging of samples in passes and their padding, which the training process does. The
loader goes two steps ahead instead of sixteen, or a stage on so little data would begin with half of it ready.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parents[1])]

MOST = 0.02
TURNS = 2
Row = tuple[str, str, float, float, str, float | None]


def rows() -> Iterator[Row]:
    """The smallest share of the turns of each way."""
    from train_rows.stages import made
    from train_rows.trainer import SCALE, WORKS, measured

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "job.json")
        for work, job in made(Path(folder), SCALE).items():
            file.write_text(job.model_dump_json())
            shares: dict[str, list[float]] = {"alone": [], "ours": []}
            for way in list(shares) * TURNS:
                shutil.rmtree(job.out, ignore_errors=True)
                shares[way].append(measured(Path(__file__), way, str(file))["loader_wait"])
            alone, ours = map(min, shares.values())
            what = "samples made ready in the training process"
            yield f"waiting for samples, {WORKS[work]}", "share", alone, ours, what, alone / MOST


def main(way: str, path: str) -> None:
    """Train the job of a file by the real loop, and tell what its meter says."""
    from nvila.components.contracts.meter import METER, measures
    from nvila.components.train import loader, loop
    from nvila.components.train.job import Job

    class Alone(loader.Loader):
        """Makes each chunk when it is asked for."""

        def __init__(self, feed: Any, samples: Any, batch: int, *_: Any) -> None:
            super().__init__(feed, samples, batch, processes=0)

        def steps(self, start: int = 0) -> Iterator[Iterator[loader.Ready]]:
            for step in range(start, -(-len(self._samples) // self._batch)):
                yield map(self._made, range(step * self._parts, (step + 1) * self._parts))

        def _made(self, number: int) -> loader.Ready:
            ready = loader.Ready()
            items, skipped = self._feed.items(self._of(number))
            ready.skipped.extend(skipped)
            for name, item in items:
                ready.names.append(name)
                ready.items.append(item)
                ready.lengths.append(self._feed.length(item))
            return ready

    class Never:
        asked = False

    if way == "alone":
        loader.Loader = Alone  # type: ignore[misc]
    loader.AHEAD_CHUNKS = 8
    job = Job.model_validate_json(Path(path).read_bytes())
    loop.train(job, Never())  # type: ignore[arg-type]
    found = measures(Path(job.out, METER))
    print(json.dumps({"loader_wait": found.loader_wait if found else None}), flush=True)
    os._exit(0)


if __name__ == "__main__":
    if sys.argv[-1].endswith(".json"):
        main(*sys.argv[1:])
    for work, _, alone, ours, what, _ in rows():
        print(f"{work}: {ours:.2%}, {what} {alone:.2%}", flush=True)
