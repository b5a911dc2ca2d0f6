"""Decodes pictures and videos that may be broken or hostile; preprocessing for the model happens in `model`."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from nvila.components.data import animation, video
from nvila.components.data.limits import Limits, MediaError, check_file, check_pixels, decoded, decoding
from nvila.components.data.picture import Shrink, opaque, whole
from nvila.components.data.sampling import Sampling, Timeline

if TYPE_CHECKING:
    from PIL import Image

__all__ = [
    "Limits",
    "MediaError",
    "Probe",
    "inside",
    "load_image",
    "load_video_frame",
    "load_video_frames",
    "probe",
    "size",
]
IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")
"""Pillow's other readers are not tried: some of them run helper programs."""
IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"})
MOST_PIXELS = 2**31 - 1
"""Of a picture or a frame: Pillow and FFmpeg count them in 32 bits."""
ORIENTATION, TRANSPOSED = 0x0112, frozenset({5, 6, 7, 8})
"""EXIF's tag, and its values that swap width and height."""


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

    check_file(path, limits)
    # Pillow refuses what has more than twice its own limit, here and in `crop`. It never shrinks: threads share it.
    if Image.MAX_IMAGE_PIXELS is not None:
        Image.MAX_IMAGE_PIXELS = max(Image.MAX_IMAGE_PIXELS, min(limits.max_pixels, MOST_PIXELS) // 2 + 1)
    with decoding(path), Image.open(path, formats=IMAGE_FORMATS) as image:
        check_pixels(image.width, image.height, path, limits)
        decoded(image.width * image.height)
        image.load()
        return _to_rgb(ImageOps.exif_transpose(image), path)


class Frames(list["Image.Image"]):
    """Frames of a clip, in order."""

    seconds: float | None = None
    """How long the whole clip is shown; None of a folder of frames, which have no times."""


def load_video_frames(path: Path, sampling: Sampling, limits: Limits = Limits(), *, shrink: Shrink = whole) -> Frames:
    """The RGB frames that `sampling` names of those that a player shows, turned upright and of square pixels.

    `path` is a video file, an animation, or a folder of frames, which are taken in the order of their names
    (frame2 before frame10, hidden files left out) and have no times. Only
    the groups of pictures that hold the wanted frames are decoded. Where one of them is damaged, the frames are chosen
    among those before the first damage of the file; `validate` quarantines such files before training. Each frame is
    kept as `shrink` makes it.

    Raises:
        MediaError: missing, larger than the limits, or without a single frame.
    """
    if path.is_dir():
        names = _frame_files(path, limits)
        return Frames(shrink(load_image(names[index], limits)) for index in sampling.places(len(names)))
    seen: list[float] = []

    def choose(timeline: Timeline) -> list[int]:
        seen.append(timeline.seconds)
        return sampling.of(timeline)

    frames = Frames(_chosen_frames(path, choose, limits, shrink))
    frames.seconds = seen[-1]
    return frames


def load_video_frame(path: Path, index: int, limits: Limits = Limits()) -> Image.Image:
    """Frame `index` (from 0, in the order of showing) of a video file, an animation or a folder of frames, RGB.

    Raises:
        MediaError: missing, larger than the limits, or it ends before that frame.
    """
    if path.is_dir():
        names = _frame_files(path, limits)
        if index < len(names):
            return load_image(names[index], limits)
        raise MediaError("undecodable", "the folder has fewer frames", path, index)
    frames = _chosen_frames(path, lambda timeline: [index] if index < len(timeline.times) else [], limits)
    if not frames:
        raise MediaError("undecodable", "the video ends before this frame", path, index)
    return frames[0]


def _chosen_frames(path: Path, choose: video.Choose, limits: Limits, shrink: Shrink = whole) -> list[Image.Image]:
    check_file(path, limits)
    if not animation.is_webp(path):
        return video.chosen_frames(path, choose, limits, shrink)
    chosen = choose(animation.webp_timeline(path, limits))
    frames = animation.webp_at(path, {*chosen}, limits, shrink)
    if len(frames) < len({*chosen}):
        raise MediaError("undecodable", "the animation has fewer frames than it says", path, len(frames))
    return [frames[place] for place in chosen]


def probe(path: Path, kind: Literal["image", "video"], limits: Limits = Limits()) -> Probe:
    """Decode every pixel of a media file, strictly: a video that yields other frames than it promises is damaged.

    Raises:
        MediaError: as `load_image` and `load_video_frames`, and for truncated videos.
    """
    if kind == "image":
        image = load_image(path, limits)
        return Probe(image.width, image.height, 1, 0.0)
    if path.is_dir():
        sizes = [load_image(name, limits).size for name in _frame_files(path, limits)]
        return Probe(*sizes[0], len(sizes), 0.0)
    check_file(path, limits)
    if not animation.is_webp(path):
        shown, frames, seconds = video.probe_video(path, limits)
        return Probe(*shown, frames, seconds)
    timeline = animation.webp_timeline(path, limits)
    sizes = [image.size for image in animation.webp_frames(path, limits)]
    if len(sizes) != len(timeline.times):
        raise MediaError("undecodable", f"truncated video: {len(sizes)} of {len(timeline.times)} frames", path)
    return Probe(*sizes[0], len(sizes), round(timeline.seconds, 3))


def size(path: Path, kind: Literal["image", "video"], limits: Limits = Limits()) -> tuple[int, int]:
    """Width and height as shown; of a clip those of its first frame, the only one that is decoded.

    Raises:
        MediaError: missing, larger than the limits, or no such medium.
    """
    if path.is_dir():
        return size(_frame_files(path, limits)[0], "image", limits)
    check_file(path, limits)
    if kind == "video" and not animation.is_webp(path):
        return video.video_size(path, limits)
    from PIL import Image

    with decoding(path), Image.open(path, formats=IMAGE_FORMATS) as image:
        check_pixels(image.width, image.height, path, limits)
        turned = image.getexif().get(ORIENTATION, 1) in TRANSPOSED
        return (image.height, image.width) if turned else image.size


def _to_rgb(image: Image.Image, path: Path) -> Image.Image:

    if image.mode.startswith("I;16"):
        return _sixteen_bit(image)
    if image.mode in ("I", "F", "LAB", "HSV"):
        raise MediaError("undecodable", "pixels of a kind without a fixed meaning as colours", path, image.mode)
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        return opaque(image)
    return image.convert("RGB")


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
