"""Fetches one object of S3 into a file: one version of it, in several tries, and compared before it is used."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nvila.components.contracts.errors import Unreachable
from nvila.components.contracts.files import sync
from nvila.components.contracts.text import say
from nvila.components.data.remote.checksums import MIB, Facts, bare, compare, facts, part_sizes
from nvila.components.data.remote.insist import insist
from nvila.components.data.remote.s3client import asked, code_of, passes


@dataclass(frozen=True)
class Object:
    """An object as a listing has it."""

    key: str
    size_bytes: int
    etag: str
    modified: str

    @classmethod
    def of(cls, item: Mapping[str, Any]) -> Object:
        """From an entry of `ListObjectsV2`."""
        return cls(item["Key"], int(item["Size"]), bare(item.get("ETag")), str(item.get("LastModified", "")))

    @property
    def version(self) -> str:
        """Changes whenever the bytes do."""
        return f"{self.etag or self.modified} {self.size_bytes}"


class _Damaged(Exception):
    """Not the bytes that the server has described."""


def download(client: Any, bucket: str, item: Object, partial: Path) -> str:
    """Have the object's bytes in `partial`, on the disk and compared; returns their sha256.

    What an earlier process left in `partial` is gone on with, and is compared with the rest of it.

    Raises:
        DataError: the server refuses.
        Unreachable: no whole and right copy in all tries, or the object was replaced since it was listed.
        OSError: the disk.
    """
    where = f"s3://{bucket}/{item.key}"

    def ask(**more: Any) -> Any:
        return insist(lambda: _head(client, bucket, item, where, **more), passes, where)

    def fetch() -> str:
        known = facts(ask(ChecksumMode="ENABLED"), bucket)
        sizes = part_sizes(known, lambda number: int(ask(PartNumber=number)["ContentLength"])) if known.parts else None
        if not known.verifiable or (known.parts and sizes is None):
            partial.unlink(missing_ok=True)  # nothing might show that its beginning is of something else
        return insist(
            lambda: _try(client, bucket, item, partial, known, sizes),
            lambda error: isinstance(error, _Damaged) or passes(error),
            where,
        )

    return asked(fetch, where)


def _try(client: Any, bucket: str, item: Object, partial: Path, known: Facts, sizes: list[int] | None) -> str:
    """One try: the bytes that are missing, then a look at all of them."""
    where = f"s3://{bucket}/{item.key}"
    _receive(client, bucket, item, partial, where)
    sha256, wrong, fits = compare(partial, known, sizes)
    if wrong:
        partial.unlink()
        raise _Damaged(f"the bytes that came do not have the {wrong} that the server names")
    if fits == "size":
        say(f"{where}: the server names no checksum that is known here; only the size was compared")
    return sha256


def _receive(client: Any, bucket: str, item: Object, partial: Path, where: str) -> None:
    have = partial.stat().st_size if partial.exists() else 0
    if have > item.size_bytes:
        partial.unlink()
        have = 0
    if have == item.size_bytes and partial.exists():
        return
    rest = {"Range": f"bytes={have}-"} if have else {}
    answer = _of_version(lambda: client.get_object(**_named(bucket, item), **rest), item, where)
    if have and not str(answer.get("ContentRange", "")).startswith(f"bytes {have}-"):
        have = 0  # a server that knows no ranges sends all of it
    coming = answer.get("ContentLength")
    if coming is not None and coming != item.size_bytes - have:
        answer["Body"].close()
        raise _Damaged(f"{coming} bytes are announced and not {item.size_bytes - have}")
    with closing(answer["Body"]) as body, partial.open("r+b" if have else "wb") as stream:
        stream.seek(have)
        while block := body.read(MIB):
            have += len(block)
            if have > item.size_bytes:
                break
            stream.write(block)
    if have > item.size_bytes:
        partial.unlink()
        raise _Damaged(f"more bytes came than the {item.size_bytes} that were listed")
    if have < item.size_bytes:
        raise _Damaged(f"{have} of {item.size_bytes} bytes came")
    sync(partial)


def _head(client: Any, bucket: str, item: Object, where: str, **more: Any) -> Any:
    answer = _of_version(lambda: client.head_object(**_named(bucket, item), **more), item, where)
    if "PartNumber" not in more and int(answer["ContentLength"]) != item.size_bytes:
        raise _changed(where)
    return answer


def _named(bucket: str, item: Object) -> dict[str, str]:
    return {"Bucket": bucket, "Key": item.key} | ({"IfMatch": f'"{item.etag}"'} if item.etag else {})


def _of_version(attempt: Any, item: Object, where: str) -> Any:
    """The answer, if it is about the version that was listed."""
    from botocore.exceptions import ClientError

    try:
        answer = attempt()
    except ClientError as error:
        if code_of(error) in ("PreconditionFailed", "412", "NoSuchKey", "404"):
            raise _changed(where) from error
        raise
    if item.etag and bare(answer.get("ETag")) not in ("", item.etag):
        raise _changed(where)
    return answer


def _changed(where: str) -> Unreachable:
    return Unreachable(
        "the object was replaced or removed while it was fetched",
        where=where,
        do="Run the same command again when the bucket is at rest.",
    )
