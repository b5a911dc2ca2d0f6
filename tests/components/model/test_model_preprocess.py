from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from nvila.components.contracts.errors import DataError
from nvila.components.model.config.config import ModelConfig
from nvila.components.model.vision.preprocess import normalise, preprocess_image, preprocess_video
from nvila.components.model.vision.tiling import dynamic_grid, dynamic_s2_grid

Configure = Callable[..., ModelConfig]
Picture = Callable[..., Image.Image]


def crops(image: Image.Image, columns: int, rows: int, side: int) -> list[np.ndarray]:
    """Pillow's own resize and crops, row by row."""
    resized = image.resize((columns * side, rows * side), Image.Resampling.BICUBIC)
    boxes = [
        (k % columns * side, k // columns * side, (k % columns + 1) * side, (k // columns + 1) * side)
        for k in range(columns * rows)
    ]
    return [np.asarray(resized.crop(box)).transpose(2, 0, 1) for box in boxes]


@given(st.integers(1, 120), st.integers(1, 120))
@settings(max_examples=25, deadline=None)
def test_dynamic_s2_cuts_like_pillow(configure: Configure, width: int, height: int) -> None:
    """Prevents a wrong tile order, a transposed tile, or scales in the wrong order, for any picture size."""
    config = configure(s2_scales=(28, 56, 84), max_tiles=12)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))
    (visual,) = preprocess_image(image, config, pixels=True)
    columns, rows = dynamic_s2_grid(width, height, config.s2_scales, 12)
    expected = [*crops(image, 1, 1, 28), *crops(image, 2, 2, 28), *crops(image, columns, rows, 28)]
    assert visual.block_size == (rows, columns)
    assert np.array_equal(visual.tiles.numpy(), np.stack(expected))


@pytest.mark.parametrize("scales", [(28, 56), (28, 56, 84), (28, 84)])
@pytest.mark.parametrize("pixels", [False, True])
def test_plain_s2_interpolates_the_largest_scale(
    configure: Configure, picture: Picture, scales: tuple[int, ...], pixels: bool
) -> None:
    """Prevents lower scales that are resized from the picture, or filtered, where the reference interpolates."""
    image, largest = picture(80, 20), scales[-1]
    (visual,) = preprocess_image(image, configure(vision_mode="s2", s2_scales=scales), pixels=pixels)
    whole = np.asarray(image.resize((largest, largest), Image.Resampling.BICUBIC), np.float64) / 127.5 - 1
    expected = []
    for scale in scales:
        across = cubic(largest, scale)
        made = np.einsum("ik,jl,klc->cij", across, across, whole)
        expected += [made[:, y : y + 28, x : x + 28] for y in range(0, scale, 28) for x in range(0, scale, 28)]
    assert visual.block_size == (largest // 28,) * 2 and visual.tiles.dtype == torch.float32
    assert np.allclose(visual.tiles.numpy(), np.stack(expected), atol=1e-5)


def cubic(size: int, target: int) -> np.ndarray:
    """(target, size): Keys' kernel with a = -0.75 over four neighbours at half-pixel centres, the border repeated."""
    made = np.zeros((target, size))
    for i in range(target):
        at = (i + 0.5) * size / target - 0.5
        for k in range(int(np.floor(at)) - 1, int(np.floor(at)) + 3):
            x = abs(at - k)
            near, far = (1.25 * x - 2.25) * x * x + 1, -0.75 * (((x - 5) * x + 8) * x - 4)
            made[i, min(max(k, 0), size - 1)] += near if x <= 1 else far
    return made


def test_dynamic_tiling_puts_the_thumbnail_last(configure: Configure, picture: Picture) -> None:
    """Prevents a missing or misplaced thumbnail, and one for a picture of a single tile."""
    config = configure(vision_mode="dynamic", projector="mlp_downsample_3x3_fix")
    image = picture(84, 56)
    columns, rows = dynamic_grid(84, 56, 28, 6)
    assert (columns, rows) == (3, 2)
    visuals = preprocess_image(image, config, pixels=True)
    tiles = torch.cat([visual.tiles for visual in visuals]).numpy()
    assert np.array_equal(tiles, np.stack([*crops(image, 3, 2, 28), *crops(image, 1, 1, 28)]))
    assert len(preprocess_image(picture(28, 28), config)) == 1


@pytest.mark.parametrize("mode", ["resize", "pad", "dynamic", "dynamic_s2"])
def test_a_picture_among_others_is_one_tile(configure: Configure, picture: Picture, mode: str) -> None:
    """Prevents multi-picture prompts from exploding into tiles, which the reference does not do at inference."""
    (visual,) = preprocess_image(picture(90, 40), configure(vision_mode=mode), alone=False)
    assert visual.tiles.shape == (1, 3, 28, 28) and visual.block_size is None


def test_normalisation(configure: Configure, picture: Picture) -> None:
    """Prevents another mean or deviation than the 0.5 that SigLIP was trained with, and normalising twice."""
    image = picture()
    (pixels,) = preprocess_image(image, configure(), pixels=True)
    (floats,) = preprocess_image(image, configure())
    assert pixels.tiles.dtype == torch.uint8 and floats.tiles.dtype == torch.float32
    assert torch.allclose(floats.tiles, (pixels.tiles.float() / 255 - 0.5) / 0.5, atol=1e-6)
    assert torch.equal(normalise(floats.tiles), floats.tiles)


def test_modes_and_palettes_are_converted(configure: Configure) -> None:
    """Prevents a crash or a wrong channel count on grey, palette and transparent pictures."""
    for mode in ("L", "P", "RGBA", "1"):
        (visual,) = preprocess_image(Image.new(mode, (30, 20)), configure())
        assert visual.tiles.shape[1:] == (3, 28, 28)


def test_padding_keeps_the_shape(configure: Configure, picture: Picture) -> None:
    """Prevents a stretched or off-centre picture, and black borders, where the mode is pad; frames are padded too."""
    config, image = configure(vision_mode="pad"), picture(60, 25)
    square = np.full((60, 60, 3), 127, dtype=np.uint8)
    square[17:42] = np.asarray(image)
    (visual,) = preprocess_image(image, config, pixels=True)
    assert visual.block_size is None
    assert np.array_equal(visual.tiles.numpy(), np.stack(crops(Image.fromarray(square), 1, 1, 28)))
    assert torch.equal(preprocess_video([image], config, pixels=True).tiles, visual.tiles)


def test_video_tiles(configure: Configure, picture: Picture) -> None:
    """Prevents frames out of order, and plain S2 from losing the frames' scales."""
    frames = [picture(30, 40, seed) for seed in range(4)]
    visual = preprocess_video(frames, configure(), pixels=True)
    assert visual.kind == "video" and visual.block_size is None
    assert np.array_equal(visual.tiles.numpy(), np.stack([crops(f, 1, 1, 28)[0] for f in frames]))
    assert preprocess_video(frames, configure(vision_mode="s2")).tiles.shape[0] == 4 * 5
    with pytest.raises(DataError):
        preprocess_video([], configure())
