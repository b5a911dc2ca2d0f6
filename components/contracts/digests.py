"""sha256 of files: several at a time, and no file twice as long as its facts are unchanged (see `index`)."""

from __future__ import annotations

import hashlib
import os
import re
import stat
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path

from nvila.components.contracts.index import Facts, index

SETTLED_NS = 2_000_000_000
"""A file changed so shortly before it was read may change again without any of its times telling, where these are
coarse: its digest is not remembered."""
_THREADS = min(4, os.cpu_count() or 1)
_TOGETHER = 512
"""Files whose digests are remembered in one transaction."""


def file_sha256(path: str | os.PathLike[str], *, fresh: bool = False) -> str:
    """Hex sha256 of one file; see `sha256_of`."""
    return sha256_of([path], fresh=fresh)[Path(path)]


def sha256_of(paths: Iterable[str | os.PathLike[str]], *, fresh: bool = False) -> dict[Path, str]:
    """Hex sha256 of each file's bytes, by the path as it was given.

    Args:
        paths: regular files, or links to such.
        fresh: read every byte now, whatever the index says.

    Raises:
        OSError: a file is gone, cannot be read, or is no regular file.
    """
    found: dict[Path, str] = {}
    todo = iter(dict.fromkeys(map(Path, paths)))
    while some := list(islice(todo, _TOGETHER)):
        known = {} if fresh else index().get((path, _facts(path)) for path in some)
        unread = [path for path in some if path not in known]
        read = _read_all(unread)
        index().put((path, facts, sha) for path, (sha, facts) in read.items() if facts)
        found |= {path: known[path] if path in known else read[path][0] for path in some}
    return found


def sha256_file(path: str | os.PathLike[str]) -> str:
    """Hex sha256 of a file's bytes, read now in blocks of 1 MiB."""
    digest = hashlib.sha256()
    with Path(path).open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def medium_sha256(path: Path, *, fresh: bool = False) -> str | None:
    """Hex sha256 of a media file, or of the names and digests of a folder of frames; None where neither is there.

    Raises:
        OSError: it cannot be read.
    """
    if path.is_file():
        return file_sha256(path, fresh=fresh)
    if not path.is_dir():
        return None
    whole = hashlib.sha256()
    for frame, sha256 in sha256_of([p for p in sorted(path.iterdir()) if p.is_file()], fresh=fresh).items():
        whole.update(f"{frame.name}\0{sha256}\0".encode("utf-8", "surrogateescape"))
    return whole.hexdigest()


def is_sha256(text: object) -> bool:
    """Whether this is a digest; tables from elsewhere may say nothing, or anything."""
    return isinstance(text, str) and re.fullmatch(r"[0-9a-f]{64}", text) is not None


def _read_all(paths: list[Path]) -> dict[Path, tuple[str, Facts | None]]:
    if len(paths) < 2:
        return {path: _read(path) for path in paths}
    with ThreadPoolExecutor(_THREADS) as pool:
        return dict(zip(paths, pool.map(_read, paths), strict=True))


def _read(path: Path) -> tuple[str, Facts | None]:
    """The digest, and the facts to remember it by; None where they might not tell of the next change."""
    began, before = time.time_ns(), _facts(path)
    sha256 = sha256_file(path)
    settled = max(before[1:3]) + SETTLED_NS < began
    return sha256, before if settled and _facts(path) == before else None


def _facts(path: Path) -> Facts:
    """Raises:
    OSError: there is no regular file; a pipe would be waited for, for ever.
    """
    found = path.stat()
    if not stat.S_ISREG(found.st_mode):
        raise OSError(0, "not a regular file", str(path))
    return found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino
