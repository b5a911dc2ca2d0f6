from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from PIL import Image

from nvila.components.model.config.config import ModelConfig
from nvila.components.model.vision import s2
from nvila.components.model.vision.preprocess import Visual, preprocess_image, preprocess_video
from nvila.components.model.vision.projector import build_projector
from nvila.components.model.vision.visual import VideoMarks, encode_visuals, token_count

Configure = Callable[..., ModelConfig]
NEWLINE = torch.full((8,), 7.0)


def tower(tiles: torch.Tensor) -> torch.Tensor:
    """A tower that keeps where things were: each patch's mean colour, padded to 24 channels."""
    patches = torch.nn.functional.avg_pool2d(tiles, 14).flatten(2).transpose(1, 2)
    return torch.nn.functional.pad(patches, (0, 21))


def sample_visuals(config: ModelConfig, picture: Callable[..., Image.Image]) -> list[Visual]:
    frames = [picture(40, 30, 10 + i) for i in range(4)]
    found = preprocess_image(picture(56, 56, 1), config)
    found.append(preprocess_video(frames, config))
    found += preprocess_image(picture(90, 30, 2), config, alone=False)
    found += preprocess_image(picture(100, 50, 3), config)
    found += preprocess_image(picture(56, 56, 4), config)
    found.append(preprocess_video(frames[::-1], config))
    return found


@pytest.mark.parametrize(
    ("mode", "scale"),
    [("resize", 0), ("pad", 0), ("dynamic", 0), ("s2", -1), ("s2", 0), ("dynamic_s2", -1), ("dynamic_s2", 0)],
)
@pytest.mark.parametrize("pools", [((1, 1, 1),), ((4, 1, 1), (2, 1, 1))])
def test_a_batch_is_its_members(
    monkeypatch: pytest.MonkeyPatch,
    configure: Configure,
    picture: Callable[..., Image.Image],
    mode: str,
    scale: int,
    pools: tuple[tuple[int, int, int], ...],
) -> None:
    """Prevents grouping from changing the order or the values, and `token_count` from disagreeing with the result."""
    config = configure(vision_mode=mode, s2_output_scale=scale, video_pool_sizes=pools)
    torch.manual_seed(0)
    projector = build_projector("mlp_downsample", config.mm_hidden_size, 8)
    visuals = sample_visuals(config, picture)
    together = encode_visuals(tower, projector, NEWLINE, visuals, config)
    assert len(together) == len(visuals)
    for visual, sequence in zip(visuals, together, strict=True):
        with torch.no_grad(), monkeypatch.context() as patch:
            patch.setattr(s2, "AT_ONCE_VALUES", 1)  # one row of blocks, or one tile, at a time
            (single,) = encode_visuals(tower, projector, NEWLINE, [visual], config)
        assert torch.allclose(sequence, single, atol=1e-5)
        assert len(sequence) == token_count(visual.kind, visual.block_size, len(visual.tiles), config)
        assert torch.equal(sequence[-1], NEWLINE)


def test_whole_picture_is_read_row_by_row(configure: Configure) -> None:
    """Prevents tokens in block order: the decoder sees the rows of the whole picture, then one line break."""
    config = configure(tile=56, s2_scales=(56, 112), projector="mlp_downsample")
    rows, columns, side = 2, 3, 4
    numbered = torch.arange(rows * columns * side * side, dtype=torch.float32)
    by_place = numbered.view(rows * side, columns * side)
    tiles = [torch.zeros(side * side)]
    tiles += [
        by_place[r * side : (r + 1) * side, c * side : (c + 1) * side].flatten()
        for r in range(rows)
        for c in range(columns)
    ]
    features = torch.stack(tiles)[:, :, None]
    visual = Visual("image", torch.zeros(1 + rows * columns, 3, 56, 56), (rows, columns))

    def first_of_each_cell(blocks: torch.Tensor) -> torch.Tensor:
        last_scale = blocks[..., -1].view(-1, side // 2, 2, side // 2, 2)[:, :, 0, :, 0]
        return last_scale.reshape(len(blocks), -1, 1).expand(-1, -1, 8)

    (sequence,) = encode_visuals(lambda _: features, first_of_each_cell, NEWLINE, [visual], config)
    assert torch.equal(sequence[:-1, 0], by_place[::2, ::2].flatten())


@pytest.mark.parametrize(
    ("kind", "output", "tokens"),
    [
        ("mlp_downsample_3x3_s2", -1, 16),  # 12 x 12 features; tile by tile it would be 36
        ("mlp_downsample_3x3_s2_new", 1, 9),
        ("mlp_downsample_3x3_fix", 0, 4),
        ("mlp_downsample", 1, 16),
        ("identity", -1, 144),
        ("mlp2x_gelu", 0, 16),
    ],
)
def test_plain_s2_is_projected_whole(
    configure: Configure, picture: Callable[..., Image.Image], kind: str, output: int, tokens: int
) -> None:
    """Prevents space-to-channel cells that are padded at the border of each tile: the reference folds the whole map."""
    config = configure(
        vision_mode="s2", tile=56, s2_scales=(56, 112, 168), s2_output_scale=output, projector=kind, max_tiles=1
    )
    seen = []

    def projector(features: torch.Tensor) -> torch.Tensor:
        seen.append(features.shape)
        return build_projector(kind, 72, 72 if kind == "identity" else 8)(features)

    newline = torch.zeros(72 if kind == "identity" else 8)
    (visual,) = preprocess_image(picture(90, 70), config)
    (sequence,) = encode_visuals(tower, projector, newline, [visual], config)
    side = 4 * (1, 2, 3)[output]
    assert seen == [(1, side * side, 72)]
    assert len(sequence) == tokens + 1 == token_count("image", (3, 3), 14, config)
    frames = preprocess_video([picture(40, 30, 1), picture(40, 30, 2)], config)
    if kind != "identity":
        (video,) = encode_visuals(tower, projector, newline, [frames], configure_pools(config))
        assert len(video) == 2 * (tokens + 1)


def configure_pools(config: ModelConfig) -> ModelConfig:
    return replace(config, video_pool_sizes=((1, 1, 1),))


def test_video_has_a_line_break_after_each_pooled_frame(
    configure: Configure, picture: Callable[..., Image.Image]
) -> None:
    """Prevents one line break per video or per raw frame; NVILA-Video's 256 frames give 32 * 257 embeddings."""
    config = configure(vision_mode="resize", video_pool_sizes=((2, 1, 1),))
    visual = preprocess_video([picture(28, 28, i) for i in range(4)], config)
    projector = build_projector("mlp_downsample", config.mm_hidden_size, 8)
    (sequence,) = encode_visuals(tower, projector, NEWLINE, [visual], config)
    assert [bool((row == NEWLINE).all()) for row in sequence] == [False, True, False, True]
    real = configure(tile=448, vision_mode="resize", video_pool_sizes=((8, 1, 1),))
    assert token_count("video", None, 256, real) == 8224


def test_pixels_and_floats_agree(configure: Configure, picture: Callable[..., Image.Image]) -> None:
    """Prevents cached uint8 tiles from reaching the tower without normalisation."""
    config = configure()
    projector = build_projector("mlp_downsample", config.mm_hidden_size, 8)
    one, other = (
        encode_visuals(tower, projector, NEWLINE, preprocess_image(picture(), config, pixels=p), config)[0]
        for p in (False, True)
    )
    assert torch.allclose(one, other, atol=1e-6)


def test_video_marks(configure: Configure, picture: Callable[..., Image.Image]) -> None:
    """Prevents marks in the wrong place or number: around each pooled frame, and behind each pooling scale."""
    config = configure(vision_mode="resize", video_pool_sizes=((2, 1, 1), (3, 1, 1)))
    visual = preprocess_video([picture(28, 28, i) for i in range(5)], config)
    projector = build_projector("mlp_downsample", config.mm_hidden_size, 8)
    marks = VideoMarks(*(torch.full((count, 8), float(value)) for count, value in ((2, 3), (1, 4), (3, 5))))
    (sequence,) = encode_visuals(tower, projector, NEWLINE, [visual], config, marks)
    names = [
        {3.0: "a", 4.0: "b", 5.0: "|"}.get(float(row[0]), ".") if len(set(row.tolist())) == 1 else "."
        for row in sequence
    ]
    assert "".join(names) == "aa.b" * 3 + "|||" + "aa.b" * 2 + "|||"
    assert len(sequence) == token_count("video", None, 5, config, (2, 1, 3))
    (bare,) = encode_visuals(tower, projector, NEWLINE, preprocess_image(picture(), config), config, marks)
    assert torch.equal(bare[-1], NEWLINE)


@pytest.mark.parametrize("kind", ["token_learner_1", "perceiver_4"])
def test_resamplers_in_every_scale(configure: Configure, picture: Callable[..., Image.Image], kind: str) -> None:
    """Prevents the paper's ablation from working with one tile only, or from being counted like space-to-channel."""
    config = configure(projector=kind)
    projector = build_projector(kind, config.mm_hidden_size, 8)
    visuals = sample_visuals(config, picture)
    for visual, sequence in zip(visuals, encode_visuals(tower, projector, NEWLINE, visuals, config), strict=True):
        assert len(sequence) == token_count(visual.kind, visual.block_size, len(visual.tiles), config)


def test_calls_of_the_projector(
    monkeypatch: pytest.MonkeyPatch, configure: Configure, picture: Callable[..., Image.Image]
) -> None:
    """Prevents ranks of ZeRO-3 from calling a gathered module a different number of times, and inference from holding
    all merged scales at once."""
    monkeypatch.setattr(s2, "AT_ONCE_VALUES", 1000)
    config = configure()
    projector = build_projector("mlp_downsample", config.mm_hidden_size, 8)
    seen: list[int] = []
    projector.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].numel()))
    visuals = sample_visuals(config, picture)
    encode_visuals(tower, projector, NEWLINE, visuals, config)
    assert len(seen) == 1
    with torch.no_grad():
        encode_visuals(tower, projector, NEWLINE, visuals, config)
    assert sum(seen[1:]) == seen[0] and max(seen[1:]) < 1000 < seen[0]
