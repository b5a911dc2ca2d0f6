"""What preprocessing, video sampling and the model's parts cost beside the plain way; results are compared first."""

from __future__ import annotations

import io
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F

from nvila.components.data.media import load_video_frames, sample_indices
from nvila.components.model.config import ModelConfig
from nvila.components.model.generation import Sampling, decode_tokens
from nvila.components.model.preprocess import preprocess_image
from nvila.components.model.projector import build_projector
from nvila.components.model.s2 import merge_scales
from nvila.components.model.splice import Spliced
from nvila.components.model.tiling import dynamic_grid, dynamic_s2_grid
from nvila.components.model.tower import tower_features
from nvila.components.model.variants import SIGLIP, VARIANTS
from nvila.components.model.visual import token_count

Measured = tuple[str, str, float, float, str]
SECONDS, FRAMES_PER_SECOND, SIZE = 600, 30, (320, 180)


def rows() -> list[Measured]:
    """Work, unit, baseline, ours, what the baseline is."""
    torch.set_num_threads(1)
    with torch.no_grad():
        return [*_preprocessing(), *_videos(), _tower(), _merge(), _decode(), *_tokens()]


def _pair(baseline: Callable[[], Any], ours: Callable[[], Any], times: int = 3) -> tuple[float, float]:
    """Best seconds of both, measured in turns."""
    best = [float("inf"), float("inf")]
    for _ in range(times):
        for index, call in enumerate((baseline, ours)):
            began = time.perf_counter()
            call()
            best[index] = min(best[index], time.perf_counter() - began)
    return best[0], best[1]


def _preprocessing() -> Iterator[Measured]:
    from transformers import SiglipImageProcessorPil

    y, x = np.mgrid[:1080, :1920]
    noise = np.random.default_rng(0).normal(0, 12, (1080, 1920, 3))
    pixels = (np.sin(x / 97 + y / 55)[..., None] * 80 + 120 + noise).clip(0, 255).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=90)
    image = Image.open(io.BytesIO(buffer.getvalue())).convert("RGB")
    scaled, tiled = VARIANTS["NVILA-8B"], VARIANTS["NVILA-Lite-8B"]
    s2_grids = [(1, 1), (2, 2), dynamic_s2_grid(*image.size, scaled.s2_scales, scaled.max_tiles)]
    dynamic_grids = [dynamic_grid(*image.size, 448, tiled.max_tiles), (1, 1)]
    processor = SiglipImageProcessorPil(size={"height": 448, "width": 448})

    def baseline(grids: list[tuple[int, int]], floats: bool) -> torch.Tensor:
        tiles = []
        for columns, rows in grids:
            resized = image.resize((448 * columns, 448 * rows), Image.Resampling.BICUBIC)
            for k in range(columns * rows):
                left, top = k % columns * 448, k // columns * 448
                tile = resized.crop((left, top, left + 448, top + 448))
                made = processor(tile, do_rescale=floats, do_normalize=floats, return_tensors="pt")
                tiles.append(made["pixel_values"][0])
        return torch.stack(tiles)

    cases = (("Dynamic-S2", scaled, s2_grids), ("dynamic tiling", tiled, dynamic_grids))
    for name, config, grids in cases:
        for kind, pixels_only in (("uint8 tiles", True), ("normalised", False)):

            def ours(config: ModelConfig = config, pixels_only: bool = pixels_only) -> torch.Tensor:
                return torch.cat([v.tiles for v in preprocess_image(image, config, pixels=pixels_only)])

            def plain(grids: list[tuple[int, int]] = grids, floats: bool = not pixels_only) -> torch.Tensor:
                return baseline(grids, floats)

            expected, found = plain(), ours()
            equal = torch.equal(expected.to(found.dtype), found) if pixels_only else torch.allclose(expected, found)
            assert equal, name
            what = "Pillow resize per scale, crop, transformers' processor per tile; tiles equal"
            yield (f"{name} of 1920x1080, {kind}", "s", *_pair(plain, ours), what)


def _videos() -> Iterator[Measured]:
    with tempfile.TemporaryDirectory() as folder:
        for keyint in (60, 250):
            path = Path(folder, f"{keyint}.mp4")
            _film(path, keyint)
            for frames in (8, 64):
                began = time.perf_counter()
                expected = _sequential(path, frames)
                middle = time.perf_counter()
                found = load_video_frames(path, frames)
                ended = time.perf_counter()
                assert all(np.array_equal(np.asarray(a), np.asarray(b)) for a, b in zip(expected, found, strict=True))
                work = f"{frames} frames of 10 minutes, keyint {keyint}"
                yield work, "s", middle - began, ended - middle, "decoding from the beginning; frames equal"


def _film(path: Path, keyint: int) -> None:
    """Ten minutes that move, at a low resolution."""
    import av

    width, height = SIZE
    noise = np.random.default_rng(0).integers(0, 256, (height // 10, width // 10 + 64, 3), dtype=np.uint8)
    wide = np.kron(noise, np.ones((10, 10, 1), dtype=np.uint8))
    with av.open(str(path), "w") as file:
        stream: Any = file.add_stream("libx264", rate=FRAMES_PER_SECOND, width=width, height=height)
        stream.pix_fmt = "yuv420p"
        stream.options = {"preset": "ultrafast", "g": str(keyint), "keyint_min": str(keyint), "sc_threshold": "0"}
        shifts = [
            av.VideoFrame.from_ndarray(np.ascontiguousarray(wide[:, s : s + width])).reformat(format="yuv420p")
            for s in range(0, 600, 5)
        ]
        for index in range(SECONDS * FRAMES_PER_SECOND):
            frame = shifts[index % len(shifts)]
            frame.pts = index
            file.mux(stream.encode(frame))
        file.mux(stream.encode())


def _sequential(path: Path, frames: int) -> list[Image.Image]:
    import av

    with av.open(str(path)) as file:
        file.streams.video[0].thread_type = "NONE"
        wanted = sample_indices(file.streams.video[0].frames, frames)
        kept = {i: f.to_image() for i, f in enumerate(file.decode(video=0)) if i in set(wanted)}
    return [kept[index] for index in wanted]


def _tower() -> Measured:
    """Width and patches of SigLIP so400m at 9 of its 27 blocks, so that one block is a ninth."""
    from transformers import SiglipVisionConfig, SiglipVisionModel

    layers = 9
    config = SiglipVisionConfig(**{**SIGLIP, "num_hidden_layers": layers, "image_size": 224})
    tower: Any = SiglipVisionModel(config).eval()
    tiles = torch.randn(1, 3, 224, 224)
    whole = tower(tiles, output_hidden_states=True).hidden_states[-2]
    assert torch.allclose(whole, tower_features(tower, tiles, -2), atol=1e-4)
    taken = _pair(lambda: tower(tiles), lambda: tower_features(tower, tiles, -2))
    return f"tower at layer -2, {layers} blocks, one tile of 224", "s", *taken, "all blocks; features equal"


def _merge() -> Measured:
    config = VARIANTS["NVILA-8B"]
    rows, columns = 3, 4
    features = torch.randn(1, 5 + rows * columns, 1024, 1152)
    projector = build_projector(config.projector, config.mm_hidden_size, 512).eval()

    def plain() -> torch.Tensor:
        maps, start = [], 0
        for r, c in ((1, 1), (2, 2), (rows, columns)):
            board = features[0, start : start + r * c].reshape(r, c, 32, 32, -1).permute(4, 0, 2, 1, 3)
            start += r * c
            area = board.reshape(1, -1, 32 * r, 32 * c)
            maps.append(F.interpolate(area, size=(32 * rows, 32 * columns), mode="area"))
        stacked = torch.cat(maps, dim=1)[0]
        blocks = stacked.reshape(-1, rows, 32, columns, 32).permute(1, 3, 2, 4, 0)
        return projector(blocks.reshape(rows * columns, 1024, -1))

    def ours() -> torch.Tensor:
        return projector(merge_scales(features, (rows, columns), config))

    assert torch.allclose(plain(), ours(), atol=1e-4)
    taken = _pair(plain, ours, times=2)
    return "S2 merge of 17 tiles and projection to 512", "s", *taken, "interpolate, concatenate, cut; tokens equal"


def _decode() -> Measured:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(
        hidden_size=128, intermediate_size=256, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=1000,
    )  # fmt: skip
    llm: Any = Qwen2ForCausalLM(config).eval()
    llm.generation_config.eos_token_id = None
    ids = torch.arange(1, 65)[None]
    spliced = Spliced(llm.model.embed_tokens(ids), torch.ones_like(ids), torch.arange(64)[None], None)

    def plain() -> list[int]:
        return llm.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=32, do_sample=False, pad_token_id=0
        )[0, 64:].tolist()

    def ours() -> list[int]:
        return decode_tokens(llm, spliced, Sampling(32, frozenset()))[0]

    assert plain() == ours()
    return (
        "decode 32 tokens with a cache, tiny decoder",
        "s",
        *_pair(plain, ours),
        "transformers' generate; tokens equal",
    )


def _tokens() -> Iterator[Measured]:
    """Visual tokens of one picture and of 64 frames, beside no compression."""
    base = replace(VARIANTS["NVILA-8B"], projector="mlp2x_gelu")
    plain = token_count("image", (3, 4), 17, base)
    for name in ("mlp_downsample", "mlp_downsample_3x3_fix"):
        count = token_count("image", (3, 4), 17, replace(base, projector=name))
        yield f"visual tokens of a 3x4 picture, {name}", "tokens", plain, count, "mlp2x_gelu, no compression"
    video = replace(VARIANTS["NVILA-8B-Video"], video_pool_sizes=((1, 1, 1),))
    plain = token_count("video", None, 64, video)
    for pool in (1, 4, 8):
        count = token_count("video", None, 64, replace(video, video_pool_sizes=((pool, 1, 1),)))
        yield f"visual tokens of 64 frames, temporal pool {pool}", "tokens", plain, count, "no pooling"
