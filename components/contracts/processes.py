"""Which process it is: known again by another one, later, and not mistaken for one that has its number since."""

from __future__ import annotations

import os
import socket
import time
from hashlib import sha256
from pathlib import Path

from pydantic import BaseModel, ConfigDict, PositiveInt

from nvila.components.contracts.text import brief

OWNER = "process.json"
"""In the folder of a run: the `Process` of the command that runs it."""


class Process(BaseModel):
    """A process of some machine."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    host: str
    """Of the machine; two of one name differ where they have an id."""
    boot: str
    """Since when its process ids count, and for whom: the machine's start, and the namespace."""
    pid: PositiveInt
    born: float
    """As of `birth`."""
    command: str = ""
    since: float = 0.0
    """When this was written, in seconds since the epoch."""

    @classmethod
    def this(cls) -> Process:
        """The one that asks."""
        words = _text("/proc/self/cmdline").rstrip("\0").split("\0")
        boot = f"{_text('/proc/sys/kernel/random/boot_id').strip()} {_namespace()}"
        pid, command = os.getpid(), brief(" ".join(words), 200)
        return cls(host=_host(), boot=boot, pid=pid, born=birth(pid) or 0.0, command=command, since=time.time())

    @property
    def alive(self) -> bool | None:
        """Whether that very process still runs; None where that cannot be told from here."""
        here = Process.this()
        if self.host != here.host:
            return None
        if self.boot == here.boot:
            return birth(self.pid) == self.born
        # Of another namespace, or of before the machine was started last.
        return None if self.boot.split()[:1] == here.boot.split()[:1] else False


def birth(pid: int) -> float | None:
    """When a process started, in seconds since the machine did; None when there is none, or only its remains.

    The time since the epoch would be another one after the clock was set, and the process nobody's.
    """
    try:
        words = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()  # from its state on
    except OSError:
        return None
    return None if words[0] in (b"Z", b"X") else int(words[19]) / os.sysconf("SC_CLK_TCK")


def _host() -> str:
    """The machine's id itself is for its owner alone."""
    number = _text("/etc/machine-id").strip()
    return socket.gethostname() + (f"-{sha256(f'nvila {number}'.encode()).hexdigest()[:8]}" if number else "")


def _namespace() -> str:
    try:
        return str(Path("/proc/self/ns/pid").readlink())
    except OSError:
        return ""


def _text(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
