"""Pictures to tiles, beside what the reference does for each."""

from __future__ import annotations

import io
from collections.abc import Iterator
from functools import partial

import numpy as np
import torch
from model_rows.measure import Measured, pair
from PIL import Image

from nvila.components.model.config.config import ModelConfig
from nvila.components.model.config.variants import VARIANTS
from nvila.components.model.vision.preprocess import normalise, preprocess_image
from nvila.components.model.vision.tiling import Grid, dynamic_grid, dynamic_s2_grid

SIDE = 448
WHOLE = "Pillow resize per scale, crop, the reference's whole processor per tile; tiles equal"
NO_FLOATS = "the same without rescaling and normalising; tiles equal"


def rows() -> Iterator[Measured]:
    """Dynamic-S2 and dynamic tiling of one picture."""
    file = _jpeg()
    image = _open(file)
    scaled, tiled = VARIANTS["NVILA-8B"], VARIANTS["NVILA-Lite-8B"]
    s2_grids = [(1, 1), (2, 2), dynamic_s2_grid(*image.size, scaled.s2_scales, scaled.max_tiles)]
    tile_grids = [dynamic_grid(*image.size, SIDE, tiled.max_tiles), (1, 1)]
    for name, config, grids, target in (
        ("Dynamic-S2", scaled, s2_grids, 2.2),
        ("dynamic tiling", tiled, tile_grids, 2.0),
    ):
        work = f"{name} of 1920x1080"
        whole, plain = partial(_reference, image, grids, True), partial(_reference, image, grids, False)
        pixels, floats = partial(_ours, image, config, True), partial(_ours, image, config, False)
        assert torch.equal(whole(), normalise(pixels())) and torch.equal(whole(), floats()), name
        assert torch.equal(plain().to(torch.uint8), pixels()), name
        yield (f"{work}, uint8 tiles", "s", *pair(whole, pixels, 7), WHOLE, target)
        yield (f"{work}, normalised", "s", *pair(whole, floats, 7), WHOLE)
        yield (f"{work}, uint8 tiles on both sides", "s", *pair(plain, pixels, 7), NO_FLOATS)
        from_file = (lambda g=grids: _reference(_open(file), g, True), lambda c=config: _ours(_open(file), c, True))
        yield (f"{work}, uint8 tiles, JPEG decoding included", "s", *pair(*from_file, 5), WHOLE)


def _jpeg() -> bytes:
    y, x = np.mgrid[:1080, :1920]
    noise = np.random.default_rng(0).normal(0, 12, (1080, 1920, 3))
    pixels = (np.sin(x / 97 + y / 55)[..., None] * 80 + 120 + noise).clip(0, 255).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def _open(file: bytes) -> Image.Image:
    return Image.open(io.BytesIO(file)).convert("RGB")


def _ours(image: Image.Image, config: ModelConfig, pixels: bool) -> torch.Tensor:
    visuals = preprocess_image(image, config, pixels=pixels)
    return visuals[0].tiles if len(visuals) == 1 else torch.cat([visual.tiles for visual in visuals])


def _reference(image: Image.Image, grids: list[Grid], floats: bool) -> torch.Tensor:
    """Each tile through the image processor, which converts, resizes (to the size it has), rescales and normalises."""
    from transformers import SiglipImageProcessorPil

    processor = SiglipImageProcessorPil(size={"height": SIDE, "width": SIDE})
    tiles = []
    for columns, rows in grids:
        resized = image.resize((SIDE * columns, SIDE * rows), Image.Resampling.BICUBIC)
        for k in range(columns * rows):
            left, top = k % columns * SIDE, k // columns * SIDE
            tile = resized.crop((left, top, left + SIDE, top + SIDE))
            made = processor(tile, do_rescale=floats, do_normalize=floats, return_tensors="pt")
            tiles.append(made["pixel_values"][0])
    return torch.stack(tiles)
