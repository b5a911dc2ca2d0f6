"""Finished work that an interrupted attempt left: believed only with a record of its files' digests, written last.

A name alone proves nothing: a power cut leaves folders whose files are torn, empty or not there.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from nvila.components.contracts.manifest import File, sha256_file, write_atomic

READERS = 4
"""Threads that read files at a time: hashing one takes longer than reading it."""


def seal(folder: Path, record: Path, patterns: Iterable[str] = ("**/*",)) -> None:
    """Bring the files under `folder` that match `patterns` to the disk, then write their record."""
    files = sorted({path for pattern in patterns for path in folder.glob(pattern) if path.is_file()})
    sync(files, folder)
    write_record(record, digests(files, folder))


def sync(files: Iterable[Path], folder: Path) -> None:
    """Bring files under `folder`, and the folders that name them, to the disk."""
    files = list(files)
    folders = {folder, *(parent for file in files for parent in file.parents if parent.is_relative_to(folder))}
    for path in [*files, *sorted(folders)]:
        _sync(path)


def digests(files: Iterable[Path], folder: Path) -> dict[str, File]:
    """Size and sha256 of files, by their names relative to `folder`."""
    files = list(files)
    with ThreadPoolExecutor(READERS) as threads:
        hashes = list(threads.map(sha256_file, files))
    names = [file.relative_to(folder).as_posix() for file in files]
    return {
        name: File(uri=name, size_bytes=file.stat().st_size, sha256=digest)
        for name, file, digest in zip(names, files, hashes, strict=True)
    }


def write_record(record: Path, files: Mapping[str, File]) -> None:
    """Write the record of `files`; it is on the disk when this returns."""
    write_atomic(record, json.dumps({name: file.model_dump() for name, file in files.items()}, indent=1) + "\n")
    _sync(record)
    _sync(record.parent)


def fault(folder: Path, record: Path) -> str | None:
    """Why the files under `folder` are not what `record` says, in a few words; None where they are."""
    if not record.is_file():
        return f"{record.name} is not there"
    try:
        files = {str(name): File.model_validate(file) for name, file in json.loads(record.read_bytes()).items()}
    except (ValueError, AttributeError):
        return f"{record.name} is damaged"
    if not files:
        return f"{record.name} names no file"
    for name, file in files.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is not there"
        if path.stat().st_size != file.size_bytes:
            return f"{name} has {path.stat().st_size} bytes instead of {file.size_bytes}"
    found = digests([folder / name for name in files], folder)
    return next((f"{name} is damaged" for name, file in files.items() if found[name].sha256 != file.sha256), None)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
