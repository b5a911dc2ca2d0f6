"""Finished work that an interrupted attempt left: believed only with a record of its files' digests, written last.

A name alone proves nothing: a power cut leaves folders whose files are torn, empty or not there.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

from nvila.components.contracts.files import sync_tree, write_atomic
from nvila.components.contracts.manifest import File, describe_files, faults_of


def seal(folder: Path, record: Path, patterns: Iterable[str]) -> None:
    """Bring what lies under `folder` to the disk, then write the record of the files that match `patterns`."""
    sync_tree(folder)
    write_record(record, describe_files(folder, patterns))


def write_record(record: Path, files: Mapping[str, File]) -> None:
    """Write the record of `files`, which are on the disk; it is there too when this returns."""
    write_atomic(record, json.dumps({name: file.model_dump() for name, file in files.items()}, indent=1) + "\n")


def fault(folder: Path, record: Path, patterns: Iterable[str] = ()) -> str | None:
    """Why the files under `folder` are not what `record` says, in a few words; None where they are.

    All are read. No file may match `patterns` that the record does not name: loaders take what lies there.
    """
    if not record.is_file():
        return f"{record.name} is not there"
    try:
        files = {str(name): File.model_validate(file) for name, file in json.loads(record.read_bytes()).items()}
    except (ValueError, AttributeError, RecursionError):
        return f"{record.name} is damaged"
    if not files:
        return f"{record.name} names no file"
    for name, why in faults_of(folder, files, deep=True, fresh=True).items():
        return f"{name}: {why}"
    known = {folder / name for name in files}
    strangers = {path for pattern in patterns for path in folder.glob(pattern) if not path.is_dir()} - known
    return f"{min(strangers).relative_to(folder)}: the step wrote no such file" if strangers else None
