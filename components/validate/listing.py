"""A digest of a folder's listing: cheap enough to be part of a content key, and it changes when a media file does."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path


def media_listing(root: Path) -> str:
    """Hex sha256 over relative name, size in bytes and modification time of every file below `root`.

    JSON files directly in `root` are left out: annotation files are digested by content.
    """
    whole = hashlib.sha256()
    for name, size_bytes, mtime_ns in sorted(_files(root.absolute(), "")):
        if "/" in name or not name.endswith(".json"):
            whole.update(f"{name}\0{size_bytes}\0{mtime_ns}\0".encode("utf-8", "surrogateescape"))
    return whole.hexdigest()


def _files(folder: Path, prefix: str) -> Iterator[tuple[str, int, int]]:
    with os.scandir(folder) as entries:
        for entry in entries:
            name = f"{prefix}{entry.name}"
            if entry.is_dir(follow_symlinks=False):
                yield from _files(Path(entry.path), name + "/")
            else:
                facts = entry.stat(follow_symlinks=not _dangling(entry))
                yield name, facts.st_size, facts.st_mtime_ns


def _dangling(entry: os.DirEntry[str]) -> bool:
    return entry.is_symlink() and not Path(entry.path).exists()
