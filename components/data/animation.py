"""Animated WebP, which FFmpeg does not decode: frames and times by Pillow, one after the other."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING

from nvila.components.data.limits import Limits, MediaError, check_length, check_pixels, decoded, decoding
from nvila.components.data.picture import Shrink, opaque
from nvila.components.data.sampling import Timeline

if TYPE_CHECKING:
    from PIL import Image

SHORTEST_SECONDS, INSTEAD_SECONDS = 0.01, 0.1
"""Browsers show frames of no more than the one for the other."""


def is_webp(path: Path) -> bool:
    """Whether the file says that it is WebP."""
    with path.open("rb") as file:
        head = file.read(12)
    return head[:4] == b"RIFF" and head[8:] == b"WEBP"


def webp_timeline(path: Path, limits: Limits) -> Timeline:
    """When the frames are shown; nothing is decoded.

    Raises:
        MediaError: beyond the limits, cut short, or no WebP.
    """
    content = memoryview(path.read_bytes())
    durations, at = [], 12
    while at + 8 <= len(content):
        name, size = bytes(content[at : at + 4]), int.from_bytes(content[at + 4 : at + 8], "little")
        if name == b"ANMF":
            shown = int.from_bytes(content[at + 20 : at + 23], "little") / 1000
            durations.append(INSTEAD_SECONDS if shown <= SHORTEST_SECONDS else shown)
            check_length(len(durations), 0.0, path, limits)
        at += 8 + size + size % 2
    if at > len(content) or int.from_bytes(content[4:8], "little") + 8 > len(content):
        raise MediaError("undecodable", "truncated video: the file ends before its last frame", path)
    *times, seconds = accumulate(durations or [INSTEAD_SECONDS], initial=0.0)
    check_length(len(times), seconds, path, limits)
    return Timeline(times, seconds)


def webp_frames(path: Path, limits: Limits) -> Iterator[Image.Image]:
    """All frames, RGB, transparency over white.

    Raises:
        MediaError: beyond the limits, or damaged.
    """
    from PIL import Image

    with decoding(path), Image.open(path, formats=["WEBP"]) as image:
        check_pixels(image.width, image.height, path, limits)
        for place in range(getattr(image, "n_frames", 1)):
            decoded(image.width * image.height)
            image.seek(place)
            yield opaque(image)


def webp_at(path: Path, places: Collection[int], limits: Limits, shrink: Shrink) -> dict[int, Image.Image]:
    """The frames at some places, as far as there are so many."""
    kept: dict[int, Image.Image] = {}
    for place, picture in enumerate(webp_frames(path, limits)):
        if place in places:
            kept[place] = shrink(picture)
        if len(kept) == len(places):
            break
    return kept
