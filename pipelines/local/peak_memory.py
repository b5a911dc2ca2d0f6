"""Peak memory of a process tree, sampled once a second."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from pathlib import Path

import psutil


class MemorySampler(threading.Thread):
    """Sums PSS over a process, all its descendants, and the servers we started (they leave the tree).

    PSS shares a page's size out over the processes that map it, so a sum counts no page twice.
    """

    def __init__(self, pid: int, runs: Path, interval_seconds: float = 1.0) -> None:
        super().__init__(name="memory", daemon=True)
        self.peak_pss_bytes = 0
        self._pid, self._runs, self._interval = pid, runs, interval_seconds
        self._done = threading.Event()

    def run(self) -> None:
        """Sample until `stop`."""
        while not self._done.wait(self._interval):
            self.sample()

    def sample(self) -> None:
        """Take one sample now."""
        self.peak_pss_bytes = max(self.peak_pss_bytes, sum(map(pss_bytes, _tree([self._pid, *self._servers()]))))

    def stop(self) -> None:
        """End the thread."""
        self._done.set()
        self.join()

    def _servers(self) -> list[int]:
        from nvila.components.serve.deployment import running

        status = running(self._runs)
        return [status.supervisor.pid, *(program.pid for program in status.programs)] if status else []


def pss_bytes(pid: int) -> int:
    """Proportional set size of one process; 0 when it has gone or is not ours to read."""
    try:
        with Path(f"/proc/{pid}/smaps_rollup").open(encoding="ascii") as lines:
            return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:")), 0)
    except OSError:
        return 0


def _tree(roots: Iterable[int]) -> set[int]:
    found: set[int] = set()
    for pid in roots:
        try:
            process = psutil.Process(pid)
            found |= {pid, *(child.pid for child in process.children(recursive=True))}
        except psutil.Error:
            continue
    return found
