"""Small files that a crash of the machine must not tear: written synced and by rename, read with a doubt."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import stat
import uuid
from pathlib import Path
from typing import Any

from nvila.components.contracts.text import say

MOST_BYTES = 2**26
"""Of a small file: far more than any manifest has."""
NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS)
"""What a file system without links answers (vfat, many FUSE mounts of buckets)."""


def write_atomic(path: Path, text: str) -> None:
    """Write `text` beside `path` and rename it there; on disk when this returns. The folder is made if missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # Not the process' number: nodes of a job that write to one volume have the same ones.
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.partial")
    try:
        partial.write_text(text, encoding="utf-8")
        sync(partial)
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    sync(path.parent)


def sync(path: Path) -> None:
    """Have the disk hold what was written to a file, or the names in a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EROFS):  # some file systems do not sync folders
            raise
    finally:
        os.close(descriptor)


def sync_tree(folder: Path) -> None:
    """`sync` everything below a folder, and the folder: to be called before a record says that it is all there."""
    for place, _, names in os.walk(folder):
        for name in names:
            path = Path(place, name)
            if path.is_file() and not path.is_symlink():
                sync(path)
        sync(Path(place))
    sync(folder.parent)


def read_bytes(path: Path) -> bytes:
    """The bytes of a small regular file.

    Raises:
        OSError: there is none, or it cannot be read; a pipe would be waited for, for ever, and a huge file fill memory.
    """
    state = path.stat()
    if not stat.S_ISREG(state.st_mode):
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    if state.st_size > MOST_BYTES:
        raise OSError(errno.EFBIG, f"larger than {MOST_BYTES:,} bytes", str(path))
    return path.read_bytes()


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file; empty where there is none, or where it is torn, which is said in one line."""
    try:
        content = json.loads(read_bytes(path).decode())
    except FileNotFoundError:
        return {}
    except OSError as error:
        why = error.strerror or str(error)
    except (ValueError, RecursionError):
        why = "it is cut off or no JSON"
    else:
        if isinstance(content, dict):
            return content
        why = "it holds something else"
    say(f"{path}: passed over: {why}")
    return {}


def link_or_copy(link: Path, target: Path) -> None:
    """A symbolic link to a file, or a copy of it where the file system has no links."""
    try:
        link.symlink_to(target)
    except OSError as error:
        if error.errno not in NO_LINKS:
            raise
        shutil.copyfile(target, link)


def discard(path: Path) -> None:
    """Remove a file, a link, or a folder that lies where a file should be; nothing where there is none."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def digest_json(content: Any) -> str:
    """Hex sha256 of the canonical JSON of `content` (sorted keys, no spaces)."""
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=True)
    return hashlib.sha256(text.encode()).hexdigest()
