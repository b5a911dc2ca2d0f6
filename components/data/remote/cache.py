"""The folder of downloads on this machine, and its locks."""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path

from nvila.components.contracts.environment import current, name_of
from nvila.components.contracts.errors import NvilaError
from nvila.components.contracts.progress import waiting_for


def cache() -> Path:
    """Where downloads are kept."""
    return (current().cache or Path("~/.cache/nvila")).expanduser()


def unwritable(error: OSError, folder: Path) -> NvilaError:
    """What to say of a disk that takes nothing more."""
    return NvilaError(
        f"the cache cannot be written: {error.strerror or error}",
        where=str(error.filename or folder),
        do=f"Free space there, or name another disk in {name_of('cache')}; the same command goes on.",
    )


@contextmanager
def alone(name: str, what: str = "") -> Iterator[None]:
    """Hold the cache's lock of this name: two pods of a node would write the same partial files."""
    path = cache() / "locks" / f"{sha256(name.encode()).hexdigest()}.lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            waiting_for(f"{what or name}: another process is fetching it; waiting for that")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield
