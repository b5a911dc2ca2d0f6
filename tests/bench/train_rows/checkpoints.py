"""How long training waits for a checkpoint, beside a save that it waits for to the end: one process, seconds.

The decoder of `overhead` with AdamW's state, 1.3 to 1.6 GB, is trained by the real engine, account and keeper. Waiting
is all that the loop would not do without checkpoints: the look at the weights, the beginning of the save, and what each
step until the checkpoint has its name asks of the keeper. The save beside it is DeepSpeed's own; then files are synced,
hashed and renamed. Files lie where TMPDIR says. By hand, with the time of each part:

    OMP_NUM_THREADS=1 .venv/bin/python tests/bench/train_rows/checkpoints.py
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
overhead: Any = import_module("overhead")

REPEATS = 3
AT_LEAST = 20
"""Waiting is to take less than a twentieth."""
QUIET_STEPS = 1
"""Steps before each save, while no checkpoint is written."""
Row = tuple[str, str, float, float, str, float | None]


@dataclass
class Times:
    """Seconds of the clock."""

    synchronous: list[float] = field(default_factory=list)
    """Of whole saves."""
    waits: list[dict[str, float]] = field(default_factory=list)
    """Of each checkpoint of ours, by what was waited for."""
    quiet: list[float] = field(default_factory=list)
    """Of steps."""
    beside: list[float] = field(default_factory=list)
    """Of steps while a checkpoint is copied, written and hashed, without waits."""


def rows() -> Iterator[Row]:
    """The wait, and what steps take longer meanwhile."""
    overhead.alone()
    for zero, precision in ((1, "fp32"), (0, "bf16")):
        times = _measured(zero, precision)
        work = f"checkpoint of 100M parameters with AdamW's state, ZeRO {zero}, {precision}"
        waited = median(sum(parts.values()) for parts in times.waits)
        yield f"{work}: training waits", "s", median(times.synchronous), waited, "a synchronous save", AT_LEAST
        yield f"{work}: a step meanwhile", "s", median(times.quiet), median(times.beside), "a step without one", None


def _measured(zero: int, precision: str, say: bool = False) -> Times:
    """Synchronous saves and ours in turns, in one process."""
    from nvila.components.train.account import Account
    from nvila.components.train.job import Job

    stage, run = overhead.settings(zero, precision)
    engine, times = overhead.started(zero, precision), Times()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name, "checkpoints")
        job = Job(stage=stage, run=run, seed=0, model="", samples="", out=name)
        meter: Any = SimpleNamespace(counts=lambda: (), step=lambda *_: "")
        samples: Any = _Samples()
        keeper = _keeper(engine, folder, [Path(name, "loss.jsonl"), Path(name, "skipped.jsonl")], run)
        account = Account(engine, keeper, job, samples, keeper.resume(), meter)
        _step(engine, account)
        for _ in range(REPEATS):
            times.synchronous.append(_synchronous(engine, folder, account.done))
            times.quiet += [_step(engine, account) for _ in range(QUIET_STEPS)]
            waits = keeper.waits = {}
            with keeper.waiting("save"):
                account.save()
            saved = folder / f"step-{account.done}"
            while not saved.exists():
                before = sum(waits.values())
                seconds = _step(engine, account)
                times.beside.append(seconds - (sum(waits.values()) - before))
            times.waits.append(waits)
            if say:
                parts = ", ".join(f"{part} {seconds:.3f}" for part, seconds in waits.items())
                share = sum(waits.values()) / times.synchronous[-1]
                print(f"synchronous {times.synchronous[-1]:.2f} s, waits {share:.1%}: {parts}", flush=True)
        account.finish()
    return times


def _keeper(*given: Any) -> Any:
    """A keeper that adds up how long it was waited for, by its methods that a step calls."""
    from nvila.components.train.keeper import Keeper

    class Timed(Keeper):
        waits: dict[str, float]

        @contextmanager
        def waiting(self, what: str) -> Iterator[None]:
            began = time.monotonic()
            yield
            self.waits[what] = self.waits.get(what, 0.0) + time.monotonic() - began

        def before_update(self) -> None:
            with self.waiting("before_update"):
                super().before_update()

        @property
        def writing(self) -> bool:
            with self.waiting("writing"):
                return super().writing

        def publish(self) -> None:
            with self.waiting("publish"):
                super().publish()

    keeper = Timed(*given)
    keeper.waits = {}
    return keeper


class _Samples:
    """Of the interface that the account wants."""

    distinct = 1000

    def __len__(self) -> int:
        return self.distinct


def _step(engine: Any, account: Any) -> float:
    from nvila.components.train.account import Share

    began = time.monotonic()
    loss, weight = engine.accumulate(ids=overhead.row(account.done))
    account.step(Share([loss], [()], supervised=weight, tokens=overhead.TOKENS))
    return time.monotonic() - began


def _synchronous(engine: Any, folder: Path, step: int) -> float:
    """The plain way: nothing goes on before the state is on the disk, with digests, under its name."""
    from nvila.components.contracts.files import sync
    from nvila.components.contracts.sealed import seal

    began = time.monotonic()
    vars(engine.deepspeed.checkpoint_engine).pop("save", None)  # the keeper's
    place, whole = folder / "partial-plain", folder / "plain"
    engine.deepspeed.save_checkpoint(str(folder), tag=place.name, client_state={"step": step}, save_latest=False)
    seal(place, place / "files.json", ["*.pt"])
    place.rename(whole)
    sync(folder)
    seconds = time.monotonic() - began
    shutil.rmtree(whole)
    return seconds


if __name__ == "__main__":
    overhead.alone()
    os.environ.setdefault("DS_LOG_LEVEL", "warning")
    for zero, precision in ((1, "fp32"), (0, "bf16")):
        print(f"ZeRO {zero}, {precision}", flush=True)
        found = _measured(zero, precision, say=True)
        whole, waited = median(found.synchronous), median(sum(parts.values()) for parts in found.waits)
        print(f"training waits {waited:.3f} s, a synchronous save takes {whole:.2f} s: {waited / whole:.1%}")
        print(f"a step meanwhile {median(found.beside):.2f} s, without {median(found.quiet):.2f} s")
