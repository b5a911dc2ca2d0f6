"""Kill points: which part of the platform ends by SIGKILL in the middle of a rollout, and how it comes back."""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from stage import Stage

Kill = Callable[[Stage], None]
LONGEST_WAIT_SECONDS = 60.0
JITTER_SECONDS = 0.3
MLFLOW_SECONDS, SERVER_SECONDS = 3.0, 3.0
"""How long each is gone before it is started again."""


def _controller(stage: Stage) -> None:
    stage.controller.kill()
    stage.controller.start()


def _mlflow(stage: Stage) -> None:
    stage.ground.registry.kill()
    time.sleep(MLFLOW_SECONDS)
    stage.ground.registry.start()


def _api_server(stage: Stage) -> None:
    stage.ground.server.kill()
    time.sleep(SERVER_SECONDS)
    stage.ground.server.start()


KILLS: Mapping[str, Kill | None] = {
    "none": None,
    "controller": _controller,
    "MLflow": _mlflow,
    "API server": _api_server,
}


@dataclass
class Moment:
    """When a cell's part is killed: right after so many changes of what is stored, and a little later."""

    changes: int
    seconds: float
    told: str = ""
    """What was stored then."""

    @classmethod
    def of(cls, cell: str, changes: int) -> Moment:
        """Another one for each cell, always the same for one: after one to so many changes."""
        draw = hashlib.sha256(cell.encode()).digest()
        return cls(1 + draw[0] % changes, JITTER_SECONDS * draw[1] / 255)


@contextmanager
def killing(stage: Stage, kill: Kill | None, moment: Moment) -> Iterator[None]:
    """What the context does goes on while it happens; it has come back when the context ends."""
    if kill is None:
        yield
        return
    thread = threading.Thread(target=_wait_and_kill, args=(stage, kill, moment))
    thread.start()
    try:
        yield
    finally:
        thread.join()


def _wait_and_kill(stage: Stage, kill: Kill, moment: Moment) -> None:
    timelines = list(stage.timelines.values())
    before, changes = [one.last.state for one in timelines], 0
    deadline = time.monotonic() + LONGEST_WAIT_SECONDS
    while changes < moment.changes and time.monotonic() < deadline:
        now = [one.last.state for one in timelines]
        changes, before = changes + (now != before), now
        time.sleep(0.02)
    time.sleep(moment.seconds)
    last = timelines[0].last
    moment.told = f"{last.status.get('phase')}, step {last.status.get('step')}, {dict(last.weights)}"
    kill(stage)
