"""Folders that a user names: on a file system of this machine, for an object store has no locks and no renames."""

from __future__ import annotations

import re
from dataclasses import dataclass
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


def standing(path: Path) -> Path:
    """The path, or the first folder above it that is there."""
    path = path.absolute()
    return next(place for place in (path, *path.parents) if _is_seen(place))


def _is_seen(place: Path) -> bool:
    try:
        return place.exists()
    except PermissionError:  # in a folder of somebody else's
        return False


@dataclass(frozen=True)
class Located:
    """Marks an option of the recipe that names a folder: a relative one begins where the recipe lies."""

    version: bool = False
    """It may name a version of the registry instead."""

    def below(self, folder: str | Path, value: str) -> str:
        """`value` as seen from where `folder` is: an address, a version and an absolute path stay as they are."""
        if is_address(value) or Path(value).is_absolute() or (self.version and is_version(value)):
            return value
        place = str(Path(folder, value))
        return f"./{place}" if self.version and is_version(place) else place
