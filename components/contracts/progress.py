"""Progress of long work: a small JSON file that the terminal's table reads, and a line on stderr for a log."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Iterable, Iterator, Sized
from pathlib import Path
from typing import Any, TypeVar

from nvila.components.contracts.environment import current
from nvila.components.contracts.text import say, visible

T = TypeVar("T")

FILE_SECONDS = 0.5
QUIET_SECONDS = 5.0
"""What is done by then has said nothing on stderr, where programs, and people after a quick command, look for what went
wrong."""
LINE_SECONDS = 20.0


class Progress:
    """Counts work done. The file is written at most every `FILE_SECONDS`; stderr has a line after `QUIET_SECONDS`, then
    one every `LINE_SECONDS`, and of work that took so long the last one."""

    def __init__(self, what: str, total: int | None = None) -> None:
        self.what, self.total, self.done = what, total, 0
        self._start = time.monotonic()
        self._written, self._due = 0.0, self._start + QUIET_SECONDS
        self._file = current().progress_file
        self.update(0)

    def update(self, advance: int = 1, note: str = "") -> None:
        """`advance` more units are done; `note` is a short remark such as `loss 1.23`."""
        self.done += advance
        now = time.monotonic()
        last = self.total is not None and self.done >= self.total
        if self._file and (last or now - self._written > FILE_SECONDS):
            self._written = now
            record = {"what": self.what, "done": self.done, "total": self.total, "note": note}
            _write(self._file, record)
        if now >= self._due or (last and now >= self._start + QUIET_SECONDS):
            self._due = now + LINE_SECONDS
            of = f"/{self.total}" if self.total is not None else ""
            line = f"{self.what}: {self.done}{of} {note} [{now - self._start:.0f} s]"
            say(visible(line))


def waiting_for(text: str) -> None:
    """Say in one line what work waits for that has nothing to count yet."""
    say(visible(text))
    if file := current().progress_file:
        _write(file, {"what": text, "done": "", "total": None, "note": ""})


def progress_file(run_dir: Path, step: str) -> Path:
    """Where a step of a run says how far it is: `handed_down`, it is written by its child processes too."""
    return run_dir / "progress" / f"{step}.json"


def track(items: Iterable[T], what: str, total: int | None = None) -> Iterator[T]:
    """Iterate over `items` while showing progress."""
    if total is None and isinstance(items, Sized):
        total = len(items)
    progress = Progress(what, total)
    for item in items:
        yield item
        progress.update()


def _write(path: Path, record: dict[str, Any]) -> None:
    """By rename, never torn; lost with the machine, since it is soon out of date (`files.write_atomic` is not)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.partial")
    try:
        partial.write_text(json.dumps(record), encoding="utf-8")
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
