"""A campaign of kills, by hand: `KILLS=50 SEED=0 WAY=1 python -m pytest -s tests/components/train/kills.py`.

Half of them come at a random instant, half inside one of `STAGES`; after each the stage goes on, and what it makes in
the end must be, bit by bit, what it makes without.
"""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from attempts import Attempt
from test_worker import changed_parts, losses, weights

from nvila.components.train import checkpoints, keeper, loop, writer
from nvila.components.train.engine import Engine
from nvila.components.train.job import Job

MakeJob = Callable[..., Job]
EVERY_STEP = {"checkpoint_seconds": 0.0}
WAYS: list[dict[str, Any]] = [
    {},
    {"methods": {"vision_tower": "layernorm", "llm": "lora"}, "lora": {"rank": 4, "dropout": 0.3}},
]
"""How parts learn: in full, and so that checkpoints hold little and dropout must be repeated."""


def die(*_: Any, **__: Any) -> None:
    """As by the kernel, where memory is short."""
    os.kill(os.getpid(), signal.SIGKILL)


def before(owner: Any, name: str, count: int) -> None:
    """Have the process die as it calls a function for the `count`th time."""
    real, calls = getattr(owner, name), iter(range(1, 1000))

    def called(*given: Any, **named: Any) -> Any:
        if next(calls) == count:
            die()
        return real(*given, **named)

    setattr(owner, name, called)


def halfway(count: int) -> None:
    """Have it die within a file of a checkpoint."""
    calls = iter(range(1, 100_000))
    real = writer._Hashed.write

    def write(stream: Any, data: Any) -> int:
        if next(calls) == count * 40:
            real(stream, memoryview(data)[: len(data) // 2])
            stream.flush()
            die()
        return real(stream, data)

    writer._Hashed.write = write  # type: ignore[method-assign]


STAGES: dict[str, Callable[[int], None]] = {
    "step": lambda count: before(Engine, "step", count),
    "copy": lambda count: before(writer, "_mapped", count * 300),
    "write": halfway,
    "record": lambda count: before(keeper, "publish", count),
    "rename": lambda count: before(checkpoints, "sync", count),
    "model": lambda count: before(loop, "seal", 1),
    "load": lambda count: before(checkpoints, "fault", 1),
}
"""Where a process can be killed: a function that sees to it, given how often it is to come by there first."""


def same(job: Job, straight: Job) -> None:
    """Weights, adapters and losses are those of a stage that nobody killed."""
    assert losses(job) == losses(straight)
    assert not changed_parts(weights(straight.out), weights(job.out))
    adapters = [weights(Path(one.out, "adapter")) for one in (straight, job)]
    assert bool(adapters[0]) == bool(job.stage.adapted) and not changed_parts(*adapters)


@pytest.mark.usefixtures("one_rank")
def test_campaign(make_job: MakeJob) -> None:
    """What five kills in CI do not meet."""
    chance = random.Random(int(os.environ.get("SEED", "0")))
    way = WAYS[int(os.environ.get("WAY", "0"))]
    straight = make_job("straight", stage=way, run=EVERY_STEP)
    began = time.monotonic()
    assert Attempt(straight).wait() == [0]
    seconds = time.monotonic() - began
    left, jobs = int(os.environ.get("KILLS", "50")), 0
    while left:
        job = make_job(f"killed-{jobs}", stage=way, run=EVERY_STEP)
        jobs += 1
        code = -signal.SIGKILL
        while code == -signal.SIGKILL:
            stage, count = chance.choice(list(STAGES)), chance.randrange(1, 4)
            if left and chance.random() < 0.5:
                attempt = Attempt(job)
                instant = chance.uniform(0, seconds)
                time.sleep(instant)
                os.kill(attempt.pids[0], signal.SIGKILL)
                where = f"after {instant:.2f} s"
            else:
                attempt = Attempt(job, partial(STAGES[stage], count) if left else lambda: None)
                where = f"{stage} {count}"
            [code] = attempt.wait()
            left -= left > 0 and code == -signal.SIGKILL
            there = sorted(path.name for path in Path(job.out, "checkpoints").glob("*"))
            print(f"{left} left: {where}: exit {code}; {' '.join(there)}", flush=True)
        assert code == 0
        same(job, straight)
