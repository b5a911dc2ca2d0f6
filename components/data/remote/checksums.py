"""Which checksums an S3 server gives for an object, and whether a file has them.

An ETag is the MD5 of an object that was sent in one piece, and `MD5(MD5 of each part)-PARTS` of one sent in parts;
under a key of a key service, in a directory bucket or on a server with rules of its own it is only a name.
"""

from __future__ import annotations

import base64
import hashlib
import re
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MIB = 1 << 20
USUAL_MIB = (8, 5, 16, 64, 32, 10, 15, 50, 100, 128, 256, 512, 6, 7, 12, 20, 24, 25, 40, 48, 96, 200, 1024, 2048, 5120)
"""Part sizes that upload programs use, tried in this order where a server does not tell the size of a part."""


@dataclass(frozen=True)
class Facts:
    """What the server says of one version of an object."""

    size_bytes: int
    etag: str
    md5: str | None
    """Where the ETag is one."""
    digests: Mapping[str, str]
    """`sha256`, `sha1` and `crc32` of the whole object, base64."""
    parts: int
    """Number of parts of an ETag of parts, else 0."""

    @property
    def verifiable(self) -> bool:
        """Whether anything but the size can be compared."""
        return bool(self.md5 or self.digests or self.parts)


def facts(head: Mapping[str, Any], bucket: str) -> Facts:
    """From the answer to `HeadObject` with `ChecksumMode=ENABLED`."""
    etag = bare(head.get("ETag"))
    named_only = (
        str(head.get("ServerSideEncryption", "")).startswith("aws:kms")
        or "SSECustomerAlgorithm" in head
        or bucket.endswith("--x-s3")
    )
    hexadecimal = None if named_only else re.fullmatch(r"([0-9a-f]{32})(?:-([1-9]\d{0,4}))?", etag)
    whole = {name: str(head.get(f"Checksum{name.upper()}", "")) for name in ("sha256", "sha1", "crc32")}
    parts = int(hexadecimal[2] or 0) if hexadecimal else 0
    return Facts(
        size_bytes=int(head["ContentLength"]),
        etag=etag,
        md5=hexadecimal[1] if hexadecimal and not parts else None,
        digests={
            name: value for name, value in whole.items() if _is_whole(value) and head.get("ChecksumType") != "COMPOSITE"
        },
        parts=parts,
    )


def bare(etag: str | None) -> str:
    """An ETag without its quotes."""
    return (etag or "").removeprefix("W/").strip('"')


def compare(path: Path, known: Facts, part_sizes: Sequence[int] | None) -> tuple[str, str | None, str]:
    """Read a file once (and once per guess, where its parts are not known).

    Args:
        path: as many bytes as the object has.
        known: what it should be.
        part_sizes: bytes of each part, or None where the server did not tell.

    Returns:
        its sha256; what does not fit, or None; what fits (`size` where there was nothing else).
    """
    sums: dict[str, Any] = {name: hashlib.new(name) for name in ("sha256", *(n for n in known.digests if n == "sha1"))}
    if known.md5:
        sums["md5"] = hashlib.md5(usedforsecurity=False)
    crc = 0
    with path.open("rb") as stream:
        while block := stream.read(MIB):
            for one in sums.values():
                one.update(block)
            if "crc32" in known.digests:
                crc = zlib.crc32(block, crc)
    sha256 = sums["sha256"].hexdigest()
    found: dict[str, bytes] = {name: one.digest() for name, one in sums.items()} | {"crc32": crc.to_bytes(4, "big")}
    wanted: dict[str, bytes] = {name: base64.b64decode(value) for name, value in known.digests.items()}
    if known.md5:
        wanted["md5"] = bytes.fromhex(known.md5)
    wrong = sorted(name for name, value in wanted.items() if found[name] != value)
    fits = sorted(set(wanted) - set(wrong))
    if known.parts and not wrong:
        guesses = [part_sizes] if part_sizes else _guesses(known.size_bytes, known.parts)
        if any(_etag_of_parts(path, sizes) == known.etag for sizes in guesses):
            fits.append("ETag of parts")
        elif part_sizes:
            wrong.append("ETag of parts")
    return sha256, ", ".join(wrong) or None, ", ".join(fits) or "size"


def part_sizes(known: Facts, ask: Callable[[int], int]) -> list[int] | None:
    """Bytes of each part of an object that was sent in parts, or None where the server does not tell.

    Args:
        known: of the object.
        ask: the size of the part with this number, from 1.
    """
    first = ask(1)
    if known.parts == 1 or first >= known.size_bytes:
        return [known.size_bytes] if known.parts == 1 else None
    if -(-known.size_bytes // first) == known.parts:
        return _equal(known.size_bytes, first)
    sizes = [first, *(ask(number) for number in range(2, known.parts + 1))]
    return sizes if sum(sizes) == known.size_bytes else None


def _is_whole(value: str) -> bool:
    """Of the object, not of its parts' checksums, which ends with their number."""
    return bool(value) and "-" not in value


def _equal(size: int, part: int) -> list[int]:
    return [min(part, size - start) for start in range(0, size, part)]


def _guesses(size: int, parts: int) -> list[list[int]]:
    return [_equal(size, n * MIB) for n in USUAL_MIB if -(-size // (n * MIB)) == parts]


def _etag_of_parts(path: Path, sizes: Sequence[int]) -> str:
    digests = hashlib.md5(usedforsecurity=False)
    with path.open("rb") as stream:
        for size in sizes:
            part = hashlib.md5(usedforsecurity=False)
            while size and (block := stream.read(min(size, MIB))):
                part.update(block)
                size -= len(block)
            digests.update(part.digest())
    return f"{digests.hexdigest()}-{len(sizes)}"
