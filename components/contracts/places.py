"""Folders that must lie on a file system of this machine: an object store has no locks and no renames."""

from __future__ import annotations

import re
from pathlib import Path

from nvila.components.contracts.errors import ConfigError

INSTEAD = "Give a local path; mount the bucket or volume and name the folder it is mounted on."
_VERSION = re.compile(r"[^/@:]+(@[^/@:]+|/[0-9]+)")
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")
"""`s3://...`, also where pathlib has made `s3:/...` of it."""


def is_address(value: str | Path) -> bool:
    """Whether this is a URI and not a path."""
    return bool(_SCHEME.match(str(value).lstrip()))


def is_version(value: str) -> bool:
    """Whether a recipe's weights are a version of the model registry, `NAME@ALIAS` or `NAME/NUMBER`.

    A folder whose path has this form is written with `./` in front.
    """
    return bool(_VERSION.fullmatch(value)) and not value.startswith((".", "~"))


def local_folder(value: str | Path, where: str) -> Path:
    """The path, unless it is the address of something else: `Path("s3://bucket")` would be a folder `s3:` here.

    Args:
        value: as the user gave it.
        where: the option or variable, for the message.

    Raises:
        ConfigError: it begins with a scheme.
    """
    if is_address(value):
        raise ConfigError(
            "not a path on this machine",
            where=where,
            value=re.sub(":/+", "://", str(value).lstrip(), count=1),
            do=INSTEAD,
        )
    return Path(value)
