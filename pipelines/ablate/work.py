"""Runs the cases side by side, as forks of one process that has imported the heavy libraries."""

from __future__ import annotations

import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn

from nvila.components.contracts.children import die_with_parent, forking, how_ended
from nvila.components.contracts.environment import current, handed_down
from nvila.components.contracts.errors import NvilaError, Preempted
from nvila.components.contracts.exits import Exit
from nvila.components.contracts.files import read_json
from nvila.components.contracts.manifest import Manifest
from nvila.components.contracts.store import Store
from nvila.components.runner.execute import identity, perform
from nvila.components.tracking.redact import tell
from nvila.pipelines.ablate.attempt import COST_FILE

IMPORTS = (
    "torch._dynamo",
    "transformers.models.qwen2.modeling_qwen2",
    "transformers.models.qwen2.tokenization_qwen2",
    "transformers.models.siglip.modeling_siglip",
    "matplotlib.figure",
    "torch.distributed.launcher.api",
    "pyarrow.parquet",
)
"""Once for all cases; none may ask CUDA for anything, or start a thread."""
GRACE_SECONDS = 60.0
"""How long a case may take to save its progress when it is asked to stop."""


@dataclass(frozen=True)
class Task:
    """One case as work of the store."""

    step: str
    """As the store calls it."""
    module: str
    """With the step's function, and `warm`, which prepares once what cases on the same samples share."""
    name: str
    settings: Mapping[str, Any]
    inputs: Mapping[str, Manifest]
    expected: float = 1.0
    """CPU seconds, about."""

    @cached_property
    def key(self) -> str:
        """The content key."""
        return identity(current(), self.step, self.module, self.settings, self.inputs)[0]

    def finished(self, store: Store) -> Manifest | None:
        """What it has made, if it has."""
        return store.finished(self.step, self.key, {name: made.digest for name, made in self.inputs.items()})

    def cost(self, store: Store) -> dict[str, float]:
        """Seconds and CPU seconds of all attempts at it."""
        return {"seconds": 0.0, "cpu_seconds": 0.0} | read_json(store.folder(self.step, self.key) / COST_FILE)


@dataclass
class Crew:
    """At most `jobs` cases at a time; ends them when it is told to stop, and they resume."""

    jobs: int
    log: Path
    """Folder of what the cases print."""
    told: Callable[[str], None]
    _under_way: dict[int, tuple[Task, float]] = field(default_factory=dict)
    _stopping: bool = False

    def run(self, tasks: Sequence[Task]) -> None:
        """Do all tasks.

        Raises:
            Preempted: SIGTERM or Ctrl-C.
            NvilaError: a case failed; those under way are brought to their end first.
        """
        self.log.mkdir(parents=True, exist_ok=True)
        failed: list[str] = []
        before = {s: signal.signal(s, self._stop) for s in (signal.SIGINT, signal.SIGTERM)}
        began, waiting, done = time.monotonic(), list(reversed(tasks)), list[Task]()
        try:
            with handed_down(threads="1"):
                _warm(tasks)
                while (waiting and not (self._stopping or failed)) or self._under_way:
                    while waiting and len(self._under_way) < self.jobs and not (self._stopping or failed):
                        self._start(waiting.pop())
                    task, code, seconds = self._next()
                    if code == Exit.DONE:
                        done.append(task)
                        left = (time.monotonic() - began) * (_expected(tasks) / _expected(done) - 1)
                        self.told(f"{len(done)}/{len(tasks)} {task.name}: {seconds:.0f} s; {duration(left)} left")
                    elif not self._stopping:
                        failed.append(f"{task.name} {how_ended(code)}")
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
        if self._stopping:
            raise Preempted("asked to stop; the same command goes on from here")
        if failed:
            raise NvilaError(f"a case failed: {failed[0]}", where=str(self.log), do="Its log tells why.")

    def _start(self, task: Task) -> None:
        parent = os.getpid()
        sys.stdout.flush()
        sys.stderr.flush()
        with forking():
            process = os.fork()
            if process == 0:
                _work(task, parent, self.log)
        self._under_way[process] = task, time.monotonic()

    def _next(self) -> tuple[Task, int, float]:
        """Wait for a case to end."""
        asked: float | None = None
        while True:
            for process, (task, began) in self._under_way.items():
                ended, status = os.waitpid(process, os.WNOHANG)
                if ended:
                    del self._under_way[process]
                    return task, os.waitstatus_to_exitcode(status), time.monotonic() - began
            if self._stopping and asked is None:
                asked = time.monotonic()
                self._signal(signal.SIGTERM)
            elif asked is not None and time.monotonic() - asked > GRACE_SECONDS:
                self._signal(signal.SIGKILL)
            time.sleep(0.1)

    def _signal(self, number: signal.Signals) -> None:
        for process in self._under_way:
            os.kill(process, number)

    def _stop(self, signum: int, frame: object) -> None:
        self._stopping = True


def _warm(tasks: Sequence[Task]) -> None:
    """Import, and prepare what cases on the same samples share, once for all forks."""
    for name in IMPORTS if tasks else ():
        import_module(name)
    for task in {task.inputs["samples"].digest: task for task in tasks}.values():
        import_module(task.module).warm(task.settings, task.inputs)


def _expected(tasks: Sequence[Task]) -> float:
    return sum(task.expected for task in tasks)


def duration(seconds: float) -> str:
    """In words."""
    minutes = round(seconds / 60)
    return f"{round(seconds)} s" if seconds < 90 else f"{minutes} min" if minutes < 90 else f"{minutes / 60:.1f} h"


def _work(task: Task, parent: int, log: Path) -> NoReturn:
    """In the fork."""
    code = int(Exit.FAULT)
    try:
        os.setpgid(0, 0)  # Ctrl-C reaches the parent alone, which asks each case to stop
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        signal.signal(signal.SIGTERM, _preempted)
        die_with_parent(parent)
        descriptor = os.open(
            log / f"{task.name.replace(', ', '-').replace(' ', '-')}.txt", os.O_CREAT | os.O_WRONLY | os.O_APPEND
        )
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        perform(current(), task.step, task.module, task.settings, task.inputs, tracked=False)
        code = int(Exit.DONE)
    except NvilaError as error:
        print(tell(f"{task.name}: {error}"), file=sys.stderr)
        code = int(error.exit_code)
    except BaseException:
        print(tell(traceback.format_exc()), file=sys.stderr)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _preempted(signum: int, frame: object) -> NoReturn:
    raise Preempted("asked to stop")
