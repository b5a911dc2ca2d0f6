"""The one place where a decoded frame becomes a picture as a player shows it: upright, of square pixels, opaque."""

from __future__ import annotations

import struct
from fractions import Fraction
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import av.video.frame
    from PIL import Image


def shown_size(frame: av.video.frame.VideoFrame, aspect: Fraction | None) -> tuple[int, int]:
    """Width and height of `to_picture`'s result; nothing is computed.

    Args:
        frame: as decoded.
        aspect: width of a pixel divided by its height; None is a square.
    """
    width, height = square_pixels(frame.width, frame.height, aspect)
    return (height, width) if _orientation(frame)[0] else (width, height)


def square_pixels(width: int, height: int, aspect: Fraction | None) -> tuple[int, int]:
    """Size after the shorter side of a pixel has been stretched to the longer; nothing gets smaller."""
    if not aspect or aspect <= 0:
        return width, height
    return (round(width * aspect), height) if aspect >= 1 else (width, round(height / aspect))


def to_picture(frame: av.video.frame.VideoFrame, aspect: Fraction | None) -> Image.Image:
    """RGB, transparency over white."""
    from PIL import Image

    if any(component.is_alpha for component in frame.format.components):
        image = opaque(Image.fromarray(frame.to_ndarray(format="rgba"), "RGBA"))
    else:
        image = frame.to_image()
    size = square_pixels(*image.size, aspect)
    if size != image.size:
        image = image.resize(size, Image.Resampling.BICUBIC)
    transposed, mirrored, flipped = _orientation(frame)
    if transposed:
        image = image.transpose(Image.Transpose.TRANSPOSE)
    if mirrored:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return image.transpose(Image.Transpose.FLIP_TOP_BOTTOM) if flipped else image


def opaque(image: Image.Image) -> Image.Image:
    """A picture with transparency over white."""
    from PIL import Image

    over = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", over.size, "white"), over).convert("RGB")


def _orientation(frame: av.video.frame.VideoFrame) -> tuple[bool, bool, bool]:
    """Whether the file's display matrix swaps x and y, and whether it then turns x, and y, round.

    The matrix (ISO/IEC 14496-12, 6.2.2) takes a point (x, y) to (a x + c y, b x + d y); other angles than right ones
    are taken for the nearest.
    """
    matrix: Any = frame.side_data.get("DISPLAYMATRIX")
    if matrix is None:
        return False, False, False
    a, b, _, c, d = struct.unpack_from("=5i", matrix)
    if abs(a) + abs(d) >= abs(b) + abs(c):
        return False, a < 0, d < 0
    return True, c < 0, b < 0
