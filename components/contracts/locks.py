"""Locks between processes: files that one of them holds. Others stand in where a file system has none.

A lock ends with the process that holds it, however that ends. Who waits for one is told who that is, and waits so long
and no longer.
"""

from __future__ import annotations

import errno
import fcntl
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from hashlib import sha256
from pathlib import Path
from typing import IO, Any

from pydantic import ValidationError

from nvila.components.contracts.errors import Unreachable
from nvila.components.contracts.processes import Process
from nvila.components.contracts.progress import waiting_for
from nvila.components.contracts.surroundings import own_folder
from nvila.components.contracts.text import say

_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
_NOT_OURS_TO_WRITE = (errno.EROFS, errno.EACCES, errno.EPERM)
PATIENCE_SECONDS = 3600.0
"""How long is waited for who holds a lock for a moment, an upload at most."""
WORK_SECONDS = 24 * 3600.0
"""The same where who holds it trains."""
SAY_SECONDS = 1.0
"""A wait that is over by then is not told of."""


@contextmanager
def alone(
    path: Path, waiting: str = "another process is at it", patience_seconds: float = PATIENCE_SECONDS
) -> Iterator[None]:
    """Hold the lock `path`; where another process holds it, say what is waited for, who has it and how long, and wait.

    Where it cannot be locked, a lock among the temporary files is held in its place: this user's processes on this
    machine keep to it. Where that is no better, nothing is held.

    Raises:
        Unreachable: another process held it all the time.
    """
    left = {path: "only this user's processes on this machine wait for each other", _stand_in(path): "nobody waits"}
    for place, instead in left.items():
        try:
            lock = place.open("a+", encoding="utf-8")
        except OSError as error:
            if error.errno not in _NOT_OURS_TO_WRITE:
                raise
            why = error.strerror
        else:
            with lock:
                if (why := _take(lock, waiting, patience_seconds)) is None:
                    _sign(lock)
                    yield
                    return
        _say_once(f"{place}: cannot be locked ({why}): {instead}")
    yield


def share(file: IO[Any]) -> None:
    """Have `is_held` tell of an open file until all who inherit it have closed it, where there are locks."""
    try:
        fcntl.flock(file, fcntl.LOCK_SH)
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise


def is_held(path: Path) -> bool | None:
    """Whether a process holds or shares the lock; None where that cannot be told."""
    try:
        with at_once(path) as free:
            return not free
    except OSError:
        return None


@contextmanager
def at_once(path: Path) -> Iterator[bool]:
    """Hold the lock if it is free, which is told; without a signature, so that the time of its file stays that of its
    last use.

    Raises:
        OSError: there is no such lock, or it cannot be locked.
    """
    with path.open("r+b") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True


@lru_cache
def lacking(folder: Path) -> bool:
    """Whether the file system of a folder has no locks: SQLite waits for each until it gives up."""
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            fcntl.lockf(file, fcntl.LOCK_EX)
    except OSError as error:
        return error.errno in _NO_LOCKS
    return False


def _take(lock: IO[str], waiting: str, patience_seconds: float) -> str | None:
    """Hold it; the system's words where it has no locks."""
    began, told = time.monotonic(), False
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return None
        except BlockingIOError:
            waited = time.monotonic() - began
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            return error.strerror
        if not told and waited >= min(SAY_SECONDS, patience_seconds):
            waiting_for(f"{waiting}; it is held{_holder(lock)}; waiting {patience_seconds:.0f} s at most")
            told = True
        if waited > patience_seconds:
            raise Unreachable(
                f"{waiting}: it was held for {waited:.0f} s{_holder(lock)}",
                where=lock.name,
                do="Look at what that process does; the same command goes on when it has ended.",
            )
        time.sleep(min(0.01 + waited / 10, 0.5))


def _sign(lock: IO[str]) -> None:
    """Say in it who holds it; where the disk is full, that is not known."""
    with suppress(OSError):
        os.ftruncate(lock.fileno(), 0)
        os.write(lock.fileno(), Process.this().model_dump_json().encode())


def _holder(lock: IO[str]) -> str:
    """In words, where the one who holds it has said so."""
    lock.seek(0)
    try:
        holder = Process.model_validate_json(lock.read())
    except ValidationError:
        return ""
    since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(holder.since))
    ended = ", which has ended: a child of it is left" if holder.alive is False else ""
    return f" since {since} by process {holder.pid} of {holder.host} ({holder.command}){ended}"


def _stand_in(path: Path) -> Path:
    return own_folder("locks") / f"{sha256(os.fsencode(path.absolute())).hexdigest()}.lock"


_say_once = lru_cache(say)
