"""From what a request names to bytes: `data:` URLs in the forms that clients send, and files that the operator allows.

Remote addresses are `remote`'s, decoding is `media`'s.
"""

from __future__ import annotations

import binascii
import os
import stat
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, unquote_to_bytes

BLANKS = b" \t\r\n\f\v"
URL_SAFE = bytes.maketrans(b"-_", b"+/")
FRAMES = "video/jpeg"
"""The type by which clients say that the parts of a `data:` URL, apart by commas, are the frames of one clip."""


@dataclass(frozen=True)
class DataUrl:
    """A `data:` URL whose content is still text."""

    parts: Sequence[str]
    """Base64, in any of its spellings: of one file, or of the frames of a clip in their order."""
    is_frames: bool

    @classmethod
    def parse(cls, url: str) -> DataUrl:
        """Of `data:[<type>][;<parameter>]...;base64,<base64>[,<base64>]...`, in any case.

        Raises:
            ValueError: it has another form.
        """
        header, comma, body = url[len("data:") :].partition(",")
        kind, *parameters = [part.strip().lower() for part in unquote(header).split(";")]
        if not comma or not parameters or parameters[-1] != "base64":
            raise ValueError("a data: URL must be in base64 and read data:<type>;base64,<bytes>")
        parts = body.split(",")
        return cls(parts, kind == FRAMES or len(parts) > 1)


def from_base64(text: str, max_bytes: int) -> bytes:
    """Decode base64: either alphabet, padded or not, with blanks and percent-encoding where transport put them.

    Raises:
        ValueError: it is not base64, empty, or of more than `max_bytes`.
    """
    try:
        content = text.encode("ascii")
        if b"%" in content:
            content = unquote_to_bytes(content)
        content = content.translate(URL_SAFE, BLANKS)
        bare = content.rstrip(b"=")
        if len(bare) * 3 // 4 > max_bytes:
            raise ValueError(f"the media of a data: URL may have at most {max_bytes} bytes")
        if not bare or len(content) - len(bare) > 2:
            raise ValueError("the bytes of a data: URL are missing or not base64")
        return binascii.a2b_base64(bare + b"=" * (-len(bare) % 4), strict_mode=True)
    except (binascii.Error, UnicodeEncodeError) as error:
        raise ValueError("the bytes of a data: URL are not base64") from error


def from_file(url: str, folders: Sequence[Path], take: Callable[[int], None]) -> bytes:
    """The content of the file that a `file://` URL names, where it lies in one of the folders.

    The path is opened once and without touching what it leads to; what was opened is judged, and that is read: neither
    a symbolic link nor an exchange in between leads out, and no pipe or device is waited for.

    Args:
        url: of the file.
        folders: that the operator names.
        take: told the file's bytes before it is read; what it raises is raised.

    Raises:
        ValueError: there is no such file there, which says nothing about files elsewhere.
    """
    if not folders:
        raise ValueError("file:// URLs are switched off on this server; send the bytes as a data: URL")
    host, slash, rest = url[len("file://") :].partition("/")
    path = unquote(slash + rest)
    if url[:7].lower() != "file://" or host.lower() not in ("", "localhost") or {*"?#"} & {*rest}:
        raise ValueError("a file: URL must read file:///<path>, with ? and # as %3F and %23")
    refusal = ValueError("no such file in the folders that this server reads media from")
    if "\0" in path or ".." in path.split("/") or not any(_inside(path, folder) for folder in folders):
        raise refusal
    try:
        seen = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except OSError:
        raise refusal from None
    try:
        itself = Path(f"/proc/self/fd/{seen}")
        lies = itself.readlink()
        found = os.fstat(seen)
        if not any(_inside(lies, folder.resolve()) for folder in folders) or not stat.S_ISREG(found.st_mode):
            raise refusal
        take(found.st_size)
        with itself.open("rb") as file:
            return file.read(found.st_size)
    except OSError:
        raise refusal from None
    finally:
        os.close(seen)


def _inside(path: str | Path, folder: Path) -> bool:
    return Path(path).is_relative_to(folder)
