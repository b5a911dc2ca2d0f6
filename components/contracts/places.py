"""Folders that must lie on a file system of this machine: an object store has no locks and no renames."""

from __future__ import annotations

import re
from pathlib import Path

from nvila.components.contracts.errors import ConfigError

_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")
"""`s3://...`, also where pathlib has made `s3:/...` of it."""


def local_folder(value: str | Path, where: str) -> Path:
    """The path, unless it is the address of something else: `Path("s3://bucket")` would be a folder `s3:` here.

    Args:
        value: as the user gave it.
        where: the option or variable, for the message.

    Raises:
        ConfigError: it begins with a scheme.
    """
    if _SCHEME.match(str(value)):
        raise ConfigError(
            "not a path on this machine",
            where=where,
            value=str(value),
            do="Give a local path; mount the bucket or volume and name the folder it is mounted on.",
        )
    return Path(value)
