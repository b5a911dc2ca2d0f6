"""Programs that outlast the command that started them: known again later, and ended with all that they have started.

Each runs in a session of its own, behind a process of ours that ends it (`contracts.children.leashed`). Where that
process was killed itself, what is left is found by the session.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from nvila.components.contracts.processes import Process, birth

KILL_SECONDS = 5.0
"""How long the kernel may take for what was killed."""


class Program(BaseModel):
    """A program that was started with `leashed`."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    pid: int
    """Of the process between, which ends the program when it is told to end."""
    born: float
    """As of `processes.birth`."""
    session: int = 0
    """Session of the program, which is its process id; 0 while it is not known."""
    session_born: float = 0.0
    """When the session's first process started."""

    @property
    def alive(self) -> bool:
        """Whether the process between runs."""
        return birth(self.pid) == self.born

    def seen(self) -> Program:
        """The same with its session, where that can be told by now."""
        if self.session or not self.alive:
            return self
        for pid, parent, session in _processes():
            if parent == self.pid and session == pid and (born := birth(pid)) is not None:
                return self.model_copy(update={"session": pid, "session_born": born})
        return self

    def members(self) -> list[int]:
        """Process ids of its session."""
        if not self.session or birth(self.session) not in (None, self.session_born):  # somebody else's by now
            return []
        mine = (pid for pid, _, session in _processes() if session == self.session)
        return [pid for pid in mine if (birth(pid) or 0.0) >= self.session_born]

    @property
    def gone(self) -> bool:
        """Whether nothing of it runs."""
        return not self.alive and not self.members()

    def end(self, grace_seconds: float) -> None:
        """Tell it to end; what is there after `grace_seconds` is killed. Where the process between is gone, at once."""
        program = self.seen()
        if program.alive:
            _send([program.pid], signal.SIGTERM)
            _wait(lambda: not program.alive, grace_seconds)
        deadline = time.monotonic() + KILL_SECONDS
        while not program.gone and time.monotonic() < deadline:  # again: a process that is killed may just have forked
            _send([*([program.pid] if program.alive else []), *program.members()], signal.SIGKILL)
            _wait(lambda: program.gone, 0.2)


def end_all(programs: Iterable[Program], boot: Process, grace_seconds: float) -> list[Program]:
    """End the programs of a record that was written by the process `boot`; returns those of which something ran.

    A record of before the machine's last start, or of another machine, names nobody of ours.
    """
    here = Process.this()
    if (boot.host, boot.boot) != (here.host, here.boot):
        return []
    left = [program for program in programs if not program.gone]
    for program in left:
        program.end(grace_seconds)
    return left


def reap() -> None:
    """Take note of children that have ended."""
    with suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def _send(pids: Iterable[int], number: signal.Signals) -> None:
    for pid in pids:
        with suppress(ProcessLookupError, PermissionError):
            os.kill(pid, number)


def _wait(until: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not until() and time.monotonic() < deadline:
        time.sleep(0.05)


def _processes() -> Iterable[tuple[int, int, int]]:
    """Process id, parent and session of every process of this machine that has not ended."""
    for place in Path("/proc").iterdir():
        if place.name.isdigit():
            with suppress(OSError, IndexError):
                words = (place / "stat").read_bytes().rpartition(b")")[2].split()  # from its state on
                if words[0] not in (b"Z", b"X"):
                    yield int(place.name), int(words[1]), int(words[3])
