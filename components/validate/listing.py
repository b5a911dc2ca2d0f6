"""A digest of a folder's content for the content key: it changes with the bytes and names of media, not with times."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

from nvila.components.contracts.digests import sha256_of


def media_listing(root: Path) -> str:
    """Hex sha256 over relative name and sha256 of every file below `root`; what cannot be read counts by its name.

    Files of JSON or JSON lines directly in `root` are left out: annotation files are digested one by one.
    """
    names = sorted(
        name for name in _files(root.absolute(), "") if "/" in name or not name.endswith((".json", ".jsonl"))
    )
    readable = {name: root.absolute() / name for name in names if _readable(root.absolute() / name)}
    digests = sha256_of(readable.values())
    whole = hashlib.sha256()
    for name in names:
        sha256 = digests[readable[name]] if name in readable else "unreadable"
        whole.update(f"{name}\0{sha256}\0".encode("utf-8", "surrogateescape"))
    return whole.hexdigest()


def _files(folder: Path, prefix: str) -> Iterator[str]:
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                yield from _files(Path(entry.path), f"{prefix}{entry.name}/")
            else:
                yield f"{prefix}{entry.name}"


def _readable(path: Path) -> bool:
    """No dangling link, link to a folder, pipe, or file of somebody else's: `validate` says what is wrong with it."""
    return path.is_file() and os.access(path, os.R_OK)
