"""Locks between processes: files that one of them holds. Others stand in where a file system has none.

A lock ends with the process that holds it, however that ends.
"""

from __future__ import annotations

import errno
import fcntl
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from hashlib import sha256
from pathlib import Path
from typing import IO, Any

from nvila.components.contracts.progress import waiting_for
from nvila.components.contracts.surroundings import own_folder
from nvila.components.contracts.text import say

_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
_NOT_OURS_TO_WRITE = (errno.EROFS, errno.EACCES, errno.EPERM)


@contextmanager
def alone(path: Path, waiting: str | None = None) -> Iterator[None]:
    """Hold the lock `path`; where another process holds it, say what is waited for and wait.

    Where it cannot be locked, a lock among the temporary files is held in its place: this user's processes on this
    machine keep to it. Where that is no better, nothing is held.
    """
    left = {path: "only this user's processes on this machine wait for each other", _stand_in(path): "nobody waits"}
    for place, instead in left.items():
        try:
            lock = place.open("w")
        except OSError as error:
            if error.errno not in _NOT_OURS_TO_WRITE:
                raise
            why = error.strerror
        else:
            with lock:
                if (why := _take(lock, waiting)) is None:
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
        with path.open("r+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return None
    return False


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


def _take(lock: IO[str], waiting: str | None) -> str | None:
    """Hold it; the system's words where it has no locks."""
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if waiting:
                waiting_for(waiting)
            fcntl.flock(lock, fcntl.LOCK_EX)
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        return error.strerror
    return None


def _stand_in(path: Path) -> Path:
    return own_folder("locks") / f"{sha256(os.fsencode(path.absolute())).hexdigest()}.lock"


_say_once = lru_cache(say)
