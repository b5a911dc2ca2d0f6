"""The folder of downloads on this machine, and its locks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path

from nvila.components.contracts import locks
from nvila.components.contracts.environment import current, name_of
from nvila.components.contracts.errors import NvilaError


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
    """Hold the cache's lock of this name: two pods of a node would write the same partial files.

    Raises:
        NvilaError: the cache cannot be written.
    """
    path = cache() / "locks" / f"{sha256(name.encode()).hexdigest()}.lock"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise unwritable(error, path.parent) from error
    with locks.alone(path, f"{what or name}: another process is fetching it", locks.WORK_SECONDS):
        yield
