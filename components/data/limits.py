"""What a media file may ask for, and how one that cannot be used is told; `media` and `video` keep to it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from nvila.components.contracts.errors import DataError

Problem = Literal["missing_file", "outside_source", "too_large", "too_long", "undecodable", "changed"]
A_DOCUMENT = (
    "a PDF, and no picture: `nvila infer --image NAME.pdf` alone reads documents; give a picture of each page instead"
)
"""Of data and of requests, whose media count one by one; `pdf` renders the pages for a question."""


class MediaError(DataError):
    """A picture or a video that cannot be used; `problem` is the short name of the reason."""

    def __init__(self, problem: Problem, what: str, where: Path | str, value: object = None) -> None:
        super().__init__(what, where=str(where), value=value)
        self.problem: Problem = problem


@dataclass(frozen=True)
class Limits:
    """What a media file may ask for. Checked before anything is decoded and while decoding again."""

    max_pixels: int = 50_000_000
    """Per picture or frame."""
    max_bytes: int = 512 * 2**20
    max_seconds: float = 3600.0
    max_frames: int = 200_000
    max_pages: int = 16
    """Of a document."""


def check_file(path: Path, limits: Limits) -> None:
    """Refuse what is no file, or one with too many bytes."""
    if not path.is_file():
        raise MediaError("missing_file", "no such media file", path)
    size = path.stat().st_size
    if size > limits.max_bytes:
        raise MediaError("too_large", f"more than {limits.max_bytes} bytes", path, size)


def check_pixels(width: int, height: int, path: Path, limits: Limits) -> None:
    """Refuse a picture or frame with too many pixels."""
    if width * height > limits.max_pixels:
        raise MediaError("too_large", f"more than {limits.max_pixels} pixels", path, f"{width}x{height}")


def check_length(frames: int, seconds: float, path: Path, limits: Limits) -> None:
    """Refuse a clip with too many frames, or that lasts too long."""
    if frames > limits.max_frames:
        raise MediaError("too_long", f"more than {limits.max_frames} frames", path, frames)
    if not seconds <= limits.max_seconds:
        raise MediaError("too_long", f"more than {limits.max_seconds} s", path, seconds)


_METER: ContextVar[Callable[[int], None] | None] = ContextVar("meter", default=None)


@contextmanager
def metered(meter: Callable[[int], None]) -> Iterator[None]:
    """While this thread decodes, `meter` is told the pixels of each picture before it is decoded, of each frame of a
    clip after that and of one when the clip is opened, and 0 for each packet; what it raises ends the decoding."""
    token = _METER.set(meter)
    try:
        yield
    finally:
        _METER.reset(token)


def decoded(pixels: int) -> None:
    """Tell whoever meters this thread."""
    if meter := _METER.get():
        meter(pixels)


@contextmanager
def decoding(path: Path) -> Iterator[None]:
    """Decoders raise anything on broken input; all of it means the same to us."""
    import warnings

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns of large pictures below our own limit
            yield
    except MediaError:
        raise
    except Exception as error:
        if type(error).__name__ == "DecompressionBombError":  # before our own check sees the header
            raise MediaError("too_large", str(error), path) from error
        if _is_document(path):
            raise MediaError("undecodable", A_DOCUMENT, path) from error
        said = getattr(error, "strerror", None) or str(error).replace(str(path), path.name)
        raise MediaError("undecodable", f"cannot be decoded: {type(error).__name__}: {said}", path) from error


def _is_document(path: Path) -> bool:
    with path.open("rb") as file:
        return b"%PDF-" in file.read(1024)
