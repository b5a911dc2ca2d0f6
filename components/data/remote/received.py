"""What was fetched into a folder of the cache and how it was checked: one JSON file beside the folder, not inside."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from nvila.components.contracts.manifest import sha256_file, write_atomic


@dataclass(frozen=True)
class Received:
    """One file."""

    origin: str
    """The version that was fetched, in the words of the service (an ETag)."""
    size_bytes: int
    sha256: str
    state: tuple[int, int, int, int]
    """Size, times of change and inode right after it was checked: as long as they stay, it is not read again."""


def state_of(path: Path) -> tuple[int, int, int, int]:
    """What changes when somebody writes to a file, also where its modification time is put back."""
    stat = path.stat()
    return stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino


def unchanged(path: Path, received: Received) -> bool:
    """Whether the file still has the bytes that were received; it is read only where its state has changed."""
    if not path.is_file() or path.is_symlink() or path.stat().st_size != received.size_bytes:
        return False
    return state_of(path) == received.state or sha256_file(path) == received.sha256


def read(path: Path) -> dict[str, Received]:
    """The record by relative file name; empty where it is missing or damaged, so that all is fetched again."""
    try:
        return _RECORD.validate_json(path.read_bytes())
    except (FileNotFoundError, ValidationError):
        return {}


def write(path: Path, record: dict[str, Received]) -> None:
    """Replace the record."""
    write_atomic(path, json.dumps({name: asdict(received) for name, received in sorted(record.items())}, indent=1))


_RECORD = TypeAdapter(dict[str, Received])
