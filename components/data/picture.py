"""The one place where a decoded frame becomes a picture as a player shows it: upright, of square pixels, opaque."""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import av.video.frame
    from PIL import Image


Shrink = Callable[["Image.Image"], "Image.Image"]
"""What is kept of a frame of a clip: many large ones would fill the memory at once."""


def whole(frame: Image.Image) -> Image.Image:
    """All of it."""
    return frame


@dataclass(frozen=True)
class Shape:
    """How the frames of a clip are to be shown."""

    aspect: Fraction | None
    """Width of a pixel divided by its height; None is a square."""
    transposed: bool = False
    """x and y change places first; then each may turn round."""
    mirrored: bool = False
    flipped: bool = False

    @classmethod
    def of(cls, frame: av.video.frame.VideoFrame, aspect: Fraction | None) -> Shape:
        """By the file's display matrix, which each of its frames has.

        The matrix (ISO/IEC 14496-12, 6.2.2) takes a point (x, y) to (a x + c y, b x + d y); other angles than right
        ones are taken for the nearest. Who asks PyAV for a frame's side data ties both into a cycle, which keeps the
        frame until the garbage collector runs: one of a clip is asked.
        """
        matrix: Any = frame.side_data.get("DISPLAYMATRIX")
        if matrix is None:
            return cls(aspect)
        a, b, _, c, d = struct.unpack_from("=5i", matrix)
        if abs(a) + abs(d) >= abs(b) + abs(c):
            return cls(aspect, False, a < 0, d < 0)
        return cls(aspect, True, c < 0, b < 0)

    def size(self, frame: av.video.frame.VideoFrame) -> tuple[int, int]:
        """Width and height of `to_picture`'s result; nothing is computed."""
        width, height = square_pixels(frame.width, frame.height, self.aspect)
        return (height, width) if self.transposed else (width, height)


def square_pixels(width: int, height: int, aspect: Fraction | None) -> tuple[int, int]:
    """Size after the shorter side of a pixel has been stretched to the longer; nothing gets smaller."""
    if not aspect or aspect <= 0:
        return width, height
    return (round(width * aspect), height) if aspect >= 1 else (width, round(height / aspect))


def to_picture(frame: av.video.frame.VideoFrame, shape: Shape) -> Image.Image:
    """RGB, transparency over white. By one thread: to start others takes longer than they save, and a fork that frees
    what they have worked with waits for them for ever."""
    from PIL import Image

    if any(component.is_alpha for component in frame.format.components):
        image = opaque(Image.fromarray(frame.to_ndarray(format="rgba", threads=1), "RGBA"))
    else:
        image = frame.to_image(threads=1)
    size = square_pixels(*image.size, shape.aspect)
    if size != image.size:
        image = image.resize(size, Image.Resampling.BICUBIC)
    if shape.transposed:
        image = image.transpose(Image.Transpose.TRANSPOSE)
    if shape.mirrored:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return image.transpose(Image.Transpose.FLIP_TOP_BOTTOM) if shape.flipped else image


def opaque(image: Image.Image) -> Image.Image:
    """A picture with transparency over white."""
    from PIL import Image

    over = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", over.size, "white"), over).convert("RGB")
