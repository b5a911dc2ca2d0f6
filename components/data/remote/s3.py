"""Weights in an S3 bucket: listed, fetched object by object, compared with the server's checksums, kept in the cache.

The folder in the cache holds the wanted objects of the bucket as it is now and nothing else.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from nvila.components.contracts.errors import DataError
from nvila.components.contracts.files import sync
from nvila.components.contracts.progress import track
from nvila.components.data.remote import received
from nvila.components.data.remote.cache import alone, cache, unwritable
from nvila.components.data.remote.insist import insist
from nvila.components.data.remote.received import Received
from nvila.components.data.remote.s3client import asked, connect, passes
from nvila.components.data.remote.s3object import Object, download
from nvila.components.data.remote.wanted import WANTED, is_wanted


@dataclass(frozen=True)
class Place:
    """`s3://bucket/prefix` at one endpoint."""

    client: Any
    bucket: str
    prefix: str
    """Ends with a slash, or is empty."""

    @classmethod
    def of(cls, name: str) -> Place:
        """From what follows `s3://`."""
        bucket, _, prefix = name.partition("/")
        return cls(connect(), bucket, prefix.strip("/") + "/" if prefix.strip("/") else "")

    @property
    def uri(self) -> str:
        """For messages."""
        return f"s3://{self.bucket}/{self.prefix}".rstrip("/")

    @property
    def folder(self) -> Path:
        """Where its files are kept. Two stores may have buckets of one name: the endpoint is a part of it."""
        named = "\n".join((self.client.meta.endpoint_url, self.bucket, self.prefix))
        last = re.sub(r"[^A-Za-z0-9._-]", "_", (self.prefix.rstrip("/") or self.bucket).rpartition("/")[2])[:60]
        return cache() / "s3" / f"{sha256(named.encode()).hexdigest()[:16]}-{last}"

    def objects(self, patterns: Sequence[str] = WANTED) -> dict[str, Object]:
        """The objects of these patterns as they are now, by name below the prefix.

        Raises:
            DataError: there are none, or the server refuses.
            Unreachable: the server does not answer.
        """

        def listed() -> list[Object]:
            pages = self.client.get_paginator("list_objects_v2").paginate(Bucket=self.bucket, Prefix=self.prefix)
            return [
                Object.of(item)
                for page in pages
                for item in page.get("Contents", [])
                if is_wanted(item["Key"], patterns) and not item["Key"].endswith("/")
            ]

        found = asked(lambda: insist(listed, passes, self.uri), self.uri)
        if not found:
            raise DataError("no weights under this prefix", where=self.uri)
        return {item.key.removeprefix(self.prefix): item for item in found}


def identity(name: str) -> dict[str, str]:
    """Version of each wanted object, by its name below the prefix: ETag and size, nothing is fetched."""
    return {name: item.version for name, item in sorted(Place.of(name).objects().items())}


def fetch(name: str, patterns: Sequence[str] = WANTED) -> tuple[Path, dict[str, str]]:
    """The folder with the objects of these patterns, and the version of each that was fetched (as `identity` has it).

    Raises:
        DataError: nothing there, or the server refuses.
        Unreachable: it does not answer, breaks off, or sends other bytes than its checksums say; or an object was
            replaced on the way.
        NvilaError: the cache cannot be written.
    """
    place = Place.of(name)
    folder = place.folder
    book, partials = folder.with_suffix(folder.suffix + ".json"), folder.with_suffix(folder.suffix + ".partial")
    try:
        with alone(str(folder), place.uri):
            objects = place.objects()
            targets = {name: _inside(folder, name) for name in objects}
            _keep_only(folder, set(targets.values()))
            record = {name: was for name, was in received.read(book).items() if name in objects}
            asked_for = [(name, item) for name, item in sorted(objects.items()) if is_wanted(name, patterns)]
            for name, item in track(asked_for, f"files of {place.uri}"):
                record[name] = _bring(place, item, targets[name], record.get(name), partials)
                received.write(book, record)
            shutil.rmtree(partials, ignore_errors=True)
    except OSError as error:
        raise unwritable(error, folder) from error
    return folder, {name: item.version for name, item in sorted(objects.items())}


def _bring(place: Place, item: Object, target: Path, was: Received | None, partials: Path) -> Received:
    """Fetch one object by rename, unless the file of this version is there."""
    if was and was.origin == item.version and received.unchanged(target, was):
        return Received(was.origin, was.size_bytes, was.sha256, received.state_of(target))
    target.unlink(missing_ok=True)
    partials.mkdir(parents=True, exist_ok=True)
    partial = partials / sha256(f"{item.key}\n{item.version}".encode()).hexdigest()[:32]
    digest = download(place.client, place.bucket, item, partial)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial.rename(target)
    sync(target.parent)
    return Received(item.version, item.size_bytes, digest, received.state_of(target))


def _inside(folder: Path, name: str) -> Path:
    """`folder/name`, refused when the object's name leads out of the folder."""
    path = folder / name
    if not path.resolve().is_relative_to(folder.resolve()):
        raise DataError("an object's name leads out of its prefix", value=name)
    return path


def _keep_only(folder: Path, wanted: set[Path]) -> None:
    """Remove everything that is no wanted file: a shard of an earlier version would be read with the new ones."""
    for path in sorted(folder.rglob("*"), reverse=True):
        if path.is_dir() and not path.is_symlink():
            with suppress(OSError):  # not empty
                path.rmdir()
        elif path not in wanted:
            path.unlink()
