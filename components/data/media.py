"""Decodes pictures and videos that may be broken or hostile; preprocessing for the model happens in `model`."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from nvila.components.contracts.errors import DataError
from nvila.components.data.sampling import Sampling
from nvila.components.data.seek import decode_at

if TYPE_CHECKING:
    import av.container
    import av.video.frame
    from PIL import Image

Problem = Literal["missing_file", "outside_source", "too_large", "too_long", "undecodable", "changed"]
IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")
"""Pillow's other readers are not tried: some of them run helper programs."""
IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"})
MOST_PIXELS = 2**31 - 1
"""Of a picture or a frame: Pillow and FFmpeg count them in 32 bits."""
VIDEO_FORMATS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpeg,mpegts"
"""FFmpeg's other demuxers are not tried: playlists among them open further files and addresses."""

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
    """What a media file may ask for. Checked against headers first and while decoding again."""

    max_pixels: int = 50_000_000
    """Per picture or frame."""
    max_bytes: int = 512 * 2**20
    max_seconds: float = 3600.0
    max_frames: int = 200_000
    max_pages: int = 16
    """Of a document."""


@dataclass(frozen=True)
class Probe:
    """What a media file holds, found by decoding all of it."""

    width: int
    height: int
    frames: int
    """1 for a picture."""
    seconds: float
    """0 for a picture and for a folder of frames."""


def inside(root: Path, name: str) -> Path:
    """Path of the media file `name` of a source.

    Raises:
        MediaError: `name` is absolute, an address, no name of a file, or leads out of `root` (by `..` or by a
            symbolic link) or in a circle.
    """
    if "://" in name or name.startswith("data:"):
        raise MediaError("outside_source", "an address; media lie as files in the source's folder", root, name)
    if Path(name).is_absolute():
        raise MediaError("outside_source", "an absolute path; a media path begins at the source's folder", root, name)
    if "\0" in name or ".." in Path(name).parts:
        raise MediaError("outside_source", "a media path must stay inside the source's folder", root, name)
    path = root / name
    try:
        leads_out = not path.resolve().is_relative_to(root.resolve())
        path.is_file()
    except (OSError, RuntimeError) as error:  # links in a circle, a name that no file can have
        raise MediaError("missing_file", "no such media file", path, getattr(error, "strerror", None)) from error
    if leads_out:
        raise MediaError("outside_source", "a symbolic link leads out of the source's folder", path)
    return path


def load_image(path: Path, limits: Limits = Limits()) -> Image.Image:
    """A picture in RGB: first frame of an animation, turned as EXIF says, transparency over white, 16 bit to 8 bit.

    Raises:
        MediaError: missing, larger than the limits, truncated, or not one of `IMAGE_FORMATS`.
    """
    from PIL import Image, ImageOps

    _check_file(path, limits)
    # Pillow refuses what has more than twice its own limit, here and in `crop`. It never shrinks: threads share it.
    if Image.MAX_IMAGE_PIXELS is not None:
        Image.MAX_IMAGE_PIXELS = max(Image.MAX_IMAGE_PIXELS, min(limits.max_pixels, MOST_PIXELS) // 2 + 1)
    with _decoding(path), Image.open(path, formats=IMAGE_FORMATS) as image:
        _check_pixels(image.width, image.height, path, limits)
        image.load()
        return _to_rgb(ImageOps.exif_transpose(image), path)


def load_video_frames(path: Path, sampling: Sampling, limits: Limits = Limits()) -> list[Image.Image]:
    """The RGB frames that `sampling` names of those that decode, by the file's average frame rate.

    `path` is a video file or a folder of frames, which are taken in the order of their names
    (frame2 before frame10, hidden files left out) and have no rate. Only
    the groups of pictures that hold the wanted frames are decoded. Where one of them is damaged, the frames are chosen
    among those before the first damage of the file; `validate` quarantines such files before training.

    Raises:
        MediaError: missing, larger than the limits, or without a single frame.
    """
    if path.is_dir():
        names = _frame_files(path, limits)
        return [load_image(names[index], limits) for index in sampling.places(len(names))]
    _check_file(path, limits)
    rate = _rate(path, limits) if sampling.fps else None

    def choose(count: int) -> list[int]:
        return sampling.places(count, rate)

    sought = _seek(path, limits, choose)
    if sought is not None:
        return sought
    count = _count_packets(path, limits)
    while count:
        wanted = set(choose(count))
        kept, decoded = {}, 0
        for frame in _decode(path, limits, strict=False):
            if decoded in wanted:
                kept[decoded] = _upright(frame)
            decoded += 1
            if decoded == count:
                break
        if decoded == count:
            return [kept[index] for index in choose(count)]
        count = decoded  # fewer than the file promises: choose again among those
    raise MediaError("undecodable", "the video has no frame that can be decoded", path)


def load_video_frame(path: Path, index: int, limits: Limits = Limits()) -> Image.Image:
    """Frame `index` (from 0, in the order of showing) of a video file or a folder of frames, RGB.

    Raises:
        MediaError: missing, larger than the limits, or it ends before that frame.
    """
    if path.is_dir():
        names = _frame_files(path, limits)
        if index < len(names):
            return load_image(names[index], limits)
        raise MediaError("undecodable", "the folder has fewer frames", path, index)
    _check_file(path, limits)
    sought = _seek(path, limits, lambda count: [index] if index < count else [])
    if sought is not None:
        return sought[0]
    for position, frame in enumerate(_decode(path, limits, strict=False)):
        if position == index:
            return _upright(frame)
    raise MediaError("undecodable", "the video ends before this frame", path, index)


def _rate(path: Path, limits: Limits) -> float:
    """The file's average frames per second."""
    with _opened(path, limits) as container:
        stream = container.streams.video[0]
        rate = float(stream.average_rate or stream.guessed_rate or 0)  # one frame has no average
    if not rate:
        raise MediaError("undecodable", "the file names no frame rate, and frames are wanted at one", path)
    return rate


def probe(path: Path, kind: Literal["image", "video"], limits: Limits = Limits()) -> Probe:
    """Decode every pixel of a media file, strictly: a video that yields fewer frames than it promises is truncated.

    Raises:
        MediaError: as `load_image` and `load_video_frames`, and for truncated videos.
    """
    if kind == "image":
        image = load_image(path, limits)
        return Probe(image.width, image.height, 1, 0.0)
    if path.is_dir():
        sizes = [load_image(name, limits).size for name in _frame_files(path, limits)]
        return Probe(*sizes[0], len(sizes), 0.0)
    _check_file(path, limits)
    promised, decoded, size, end = _count_packets(path, limits), 0, (0, 0), 0.0
    for frame in _decode(path, limits, strict=True):
        decoded, size, end = decoded + 1, (frame.width, frame.height), max(end, frame.time or 0.0)
    if decoded == 0:
        raise MediaError("undecodable", "the video has no frame that can be decoded", path)
    if decoded < promised:
        raise MediaError("undecodable", f"truncated video: {decoded} of {promised} frames can be decoded", path)
    return Probe(*size, decoded, round(end, 3))


def size(path: Path, kind: Literal["image", "video"], limits: Limits = Limits()) -> tuple[int, int]:
    """Width and height as the header says, of a folder of frames those of its first; nothing is decoded.

    Raises:
        MediaError: missing, larger than the limits, or no such medium.
    """
    if path.is_dir():
        return size(_frame_files(path, limits)[0], "image", limits)
    _check_file(path, limits)
    if kind == "video":
        with _opened(path, limits) as container:
            return container.streams.video[0].width, container.streams.video[0].height
    from PIL import Image

    with _decoding(path), Image.open(path, formats=IMAGE_FORMATS) as image:
        _check_pixels(image.width, image.height, path, limits)
        return image.size


def _check_file(path: Path, limits: Limits) -> None:
    if not path.is_file():
        raise MediaError("missing_file", "no such media file", path)
    size = path.stat().st_size
    if size > limits.max_bytes:
        raise MediaError("too_large", f"more than {limits.max_bytes} bytes", path, size)


def _check_pixels(width: int, height: int, path: Path, limits: Limits) -> None:
    if width * height > limits.max_pixels:
        raise MediaError("too_large", f"more than {limits.max_pixels} pixels", path, f"{width}x{height}")


@contextmanager
def _decoding(path: Path) -> Iterator[None]:
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


def _to_rgb(image: Image.Image, path: Path) -> Image.Image:
    from PIL import Image

    if image.mode.startswith("I;16"):
        return _sixteen_bit(image)
    if image.mode in ("I", "F", "LAB", "HSV"):
        raise MediaError("undecodable", "pixels of a kind without a fixed meaning as colours", path, image.mode)
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        over = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", over.size, "white"), over).convert("RGB")
    return image.convert("RGB")


def _upright(frame: av.video.frame.VideoFrame) -> Image.Image:
    """The frame as a telephone's owner saw it: turned as the file's display matrix says."""
    image = frame.to_image()
    return image.rotate(frame.rotation, expand=True) if frame.rotation else image


def _sixteen_bit(image: Image.Image) -> Image.Image:
    """0..65535 to 0..255; Pillow's own conversion clips instead."""
    import numpy as np
    from PIL import Image

    return Image.fromarray(np.rint(np.asarray(image) / 257).astype(np.uint8)).convert("RGB")


def _frame_files(folder: Path, limits: Limits) -> list[Path]:
    seen = (name for name in folder.iterdir() if name.suffix.lower() in IMAGE_SUFFIXES and name.name[0] != ".")
    names = sorted(seen, key=_natural)
    if not names:
        raise MediaError("undecodable", "the folder holds no frames", folder)
    if len(names) > limits.max_frames:
        raise MediaError("too_long", f"more than {limits.max_frames} frames", folder, len(names))
    return [inside(folder, name.name) for name in names]


def _natural(path: Path) -> tuple[list[str | int], str]:
    """frame2 before frame10, as people number files."""
    parts = re.split(r"(\d+)", path.name)
    return [int(part) if place % 2 else part for place, part in enumerate(parts)], path.name


@contextmanager
def _opened(path: Path, limits: Limits) -> Iterator[av.container.InputContainer]:
    import av

    options = {"format_whitelist": VIDEO_FORMATS, "protocol_whitelist": "file"}
    with _decoding(path), av.open(f"file:{path.absolute()}", options=options) as container:
        if not container.streams.video:
            raise MediaError("undecodable", "the file holds no video", path)
        stream = container.streams.video[0]
        _check_pixels(stream.width, stream.height, path, limits)
        if container.duration is not None and container.duration / av.time_base > limits.max_seconds:
            raise MediaError("too_long", f"more than {limits.max_seconds} s", path, container.duration / av.time_base)
        if stream.frames > limits.max_frames:
            raise MediaError("too_long", f"more than {limits.max_frames} frames", path, stream.frames)
        stream.thread_type = "NONE"
        yield container


def _count_packets(path: Path, limits: Limits) -> int:
    """Frames that the file promises to show: what its index says, less what an edit list hides, or the packets where it
    says nothing; nothing is decoded."""
    with _opened(path, limits) as container:
        stream = container.streams.video[0]
        if stream.frames:
            return int(stream.frames) - sum(entry.is_discard for entry in stream.index_entries)
        count = 0
        for packet in container.demux(stream):
            count += packet.size > 0
            if count > limits.max_frames:
                raise MediaError("too_long", f"more than {limits.max_frames} frames", path)
        return count


def _seek(path: Path, limits: Limits, choose: Callable[[int], Sequence[int]]) -> list[Image.Image] | None:
    """The frames that `choose` names out of their number; None where only decoding from the beginning finds them."""
    with _opened(path, limits) as container:
        found = decode_at(container, choose, limits.max_seconds, limits.max_frames)
        if found is None:
            return None
        chosen, frames = found
        for frame in frames.values():
            _check_pixels(frame.width, frame.height, path, limits)
        pictures = {place: _upright(frame) for place, frame in frames.items()}
        return [pictures[place] for place in chosen]


def _decode(path: Path, limits: Limits, *, strict: bool) -> Iterator[av.video.frame.VideoFrame]:
    """Frames in the order of showing. With `strict` a damaged place is an error, else the end."""
    import av

    with _opened(path, limits) as container:
        decoded, began = 0, None
        try:
            for frame in container.decode(video=0):
                decoded += 1
                if decoded > limits.max_frames:
                    raise MediaError("too_long", f"more than {limits.max_frames} frames", path)
                _check_pixels(frame.width, frame.height, path, limits)
                if frame.time is not None:
                    began = frame.time if began is None else began  # a cut out of a recording keeps its clock
                    if not frame.time - began <= limits.max_seconds:
                        raise MediaError("too_long", f"more than {limits.max_seconds} s", path, frame.time - began)
                yield frame
        except av.error.FFmpegError:
            if strict:
                raise
