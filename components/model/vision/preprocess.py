"""From a picture or the frames of a video to the tower's input tiles (`llava/mm_utils.py`).

Decoding files and sampling frames happens before (data.media); the tower and everything behind it comes after.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F

from nvila.components.contracts.errors import DataError
from nvila.components.model.config.config import ModelConfig
from nvila.components.model.vision.resize import resize
from nvila.components.model.vision.tiling import Grid, dynamic_grid, dynamic_s2_grid

Kind = Literal["image", "video"]
BlockSize = tuple[int, int]
"""(rows, columns) of the last scale's tiles."""
MEAN_COLOUR = (127, 127, 127)
"""The image processor's mean of 0.5 as a pixel, cut to an integer as the reference does."""
CACHED_VALUES = 2**20
"""Values that are normalised at once: few enough to stay near the processor from one operation to the next."""
Medium = Image.Image | Sequence[Image.Image]
"""A picture, or a video as its sampled frames."""


@dataclass(frozen=True)
class Visual:
    """What one media token stands for."""

    kind: Kind
    tiles: torch.Tensor
    """(T, 3, S, S): float32, or the same as uint8 pixels, which take a quarter of the memory in a cache. White is 1 and
    black -1; the lower scales of plain S2 are interpolated, may go a little beyond, and are always float32."""
    block_size: BlockSize | None
    """(rows, columns) of the largest scale; None is one tile per picture or frame."""
    features: torch.Tensor | None = None
    """(T, N, C) of the tiles, where the tower has seen them already: it is not asked again."""
    seconds: float | None = None
    """How long a clip is shown, where that is known; times in the conversation are shares of it."""

    def normalised(self) -> Visual:
        """The same with float tiles."""
        return replace(self, tiles=normalise(self.tiles))


def normalise(tiles: torch.Tensor) -> torch.Tensor:
    """uint8 pixels to the tower's range: (x / 255 - 0.5) / 0.5. Float tiles pass."""
    if tiles.dtype != torch.uint8:
        return tiles
    made = torch.empty(tiles.shape, dtype=torch.float32, device=tiles.device)
    together = max(1, CACHED_VALUES // max(1, tiles[0:1].numel()))
    for pixels, values in zip(tiles.split(together), made.split(together), strict=True):
        values.copy_(pixels).div_(127.5).sub_(1.0)
    return made


def preprocess_image(
    image: Image.Image, config: ModelConfig, *, alone: bool = True, pixels: bool = False
) -> list[Visual]:
    """Tiles of one picture.

    Args:
        image: the decoded picture, of any size and mode.
        config: gives vision mode, scales and the most tiles.
        alone: False leaves a picture of a multi-picture prompt untiled, as in the reference at inference.
        pixels: leave the tiles uint8, for a cache; those of plain S2 are not whole numbers and stay float32.

    Returns:
        One Visual; with dynamic tiling one per tile, the thumbnail last.
    """
    image = image.convert("RGB")
    if config.vision_mode == "dynamic" and alone:
        visuals = [Visual("image", tile[None], None) for tile in _dynamic_tiles(image, config)]
    elif config.vision_mode == "s2" or (config.vision_mode == "dynamic_s2" and alone):
        visuals = [_s2_visual(image, config)]
    else:
        visuals = [Visual("image", _cut(_whole(image, config), [(1, 1)], config.tile_pixels), None)]
    return visuals if pixels else [visual.normalised() for visual in visuals]


def preprocess_video(frames: Sequence[Image.Image], config: ModelConfig, *, pixels: bool = False) -> Visual:
    """Tiles of a video's frames, in order: one tile a frame, in plain S2 all scales of each frame.

    Raises:
        DataError: there is no frame.
    """
    if not frames:
        raise DataError("a video without frames", do="Check that the file can be decoded")
    each = [preprocess_image(frame, config, alone=False, pixels=True)[0] for frame in frames]
    tiles, seconds = torch.cat([frame.tiles for frame in each]), getattr(frames, "seconds", None)
    visual = Visual("video", tiles, each[0].block_size, seconds=seconds)
    return visual if pixels else visual.normalised()


def shrunk(frame: Image.Image, config: ModelConfig) -> Image.Image:
    """The frame in the size that the model sees: `preprocess_video` makes the same tiles of it, to the bit."""
    side = config.s2_scales[-1] if config.vision_mode == "s2" else config.tile_pixels
    return Image.fromarray(resize(_whole(frame, config), [(side, side)])[0])


def blank(visual: Visual) -> Visual:
    """The same tiles in the middle grey of SigLIP's normalisation: a model that sees nothing."""
    grey = torch.full_like(visual.tiles, 127 if visual.tiles.dtype == torch.uint8 else 0)
    return replace(visual, tiles=grey, features=None)


def _whole(image: Image.Image, config: ModelConfig) -> Image.Image:
    return _squared(image) if config.vision_mode == "pad" else image


def _squared(image: Image.Image) -> Image.Image:
    """The picture in the middle of a square of its longer side, the rest in SigLIP's mean colour."""
    width, height = image.size
    side = max(width, height)
    square = Image.new("RGB", (side, side), MEAN_COLOUR)
    square.paste(image, ((side - width) // 2, (side - height) // 2))
    return square


def _dynamic_tiles(image: Image.Image, config: ModelConfig) -> torch.Tensor:
    grid = dynamic_grid(*image.size, config.tile_pixels, config.max_tiles)
    return _cut(image, [grid] if grid == (1, 1) else [grid, (1, 1)], config.tile_pixels)


def _s2_visual(image: Image.Image, config: ModelConfig) -> Visual:
    """All scales of one picture, ascending; the last is square in plain S2 and follows the picture in Dynamic-S2."""
    side = config.scale_tiles[-1]
    if config.vision_mode == "s2":
        return Visual("image", _interpolated(image, config), (side, side))
    columns, rows = dynamic_s2_grid(*image.size, config.s2_scales, config.max_tiles)
    grids = [(tiles, tiles) for tiles in config.scale_tiles[:-1]] + [(columns, rows)]
    return Visual("image", _cut(image, grids, config.tile_pixels), (rows, columns))


def _interpolated(image: Image.Image, config: ModelConfig) -> torch.Tensor:
    """(T, 3, S, S) float32: the picture resized to the last scale, and that interpolated to each of the others.

    Bicubic with torch's a = -0.75 and without a filter against aliasing, as the reference's `s2wrapper` does inside of
    the tower; Dynamic-S2 resizes each scale from the picture.
    """
    largest = normalise(_cut(image, [(1, 1)], config.s2_scales[-1]))
    side, tiles = config.tile_pixels, []
    for scale, n in zip(config.s2_scales, config.scale_tiles, strict=True):
        whole = largest if scale == config.s2_scales[-1] else F.interpolate(largest, size=scale, mode="bicubic")
        tiles.append(whole.view(3, n, side, n, side).permute(1, 3, 0, 2, 4).reshape(-1, 3, side, side))
    return torch.cat(tiles)


def _cut(image: Image.Image, grids: Sequence[Grid], side: int) -> torch.Tensor:
    """(T, 3, side, side) uint8: for each (columns, rows) the picture resized without keeping its shape, cut row by row.

    Colours stay next to each other in memory: moving them apart would cost a copy that is slow because it is scattered.
    """
    tiles = np.empty((sum(columns * rows for columns, rows in grids), side, side * 3), np.uint8)
    resized = resize(image, [(columns * side, rows * side) for columns, rows in grids])
    start = 0
    for (columns, rows), pixels in zip(grids, resized, strict=True):
        part = tiles[start : start + columns * rows].reshape(rows, columns, side, side * 3)
        part[:] = pixels.reshape(rows, side, columns, side * 3).transpose(0, 2, 1, 3)
        start += columns * rows
    return torch.from_numpy(tiles.reshape(-1, side, side, 3)).permute(0, 3, 1, 2)
