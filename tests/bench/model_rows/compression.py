"""What compression saves: visual tokens, and the decoder's prefill over them.

Prefill runs one layer of NVILA-Lite-2B's decoder in bfloat16 with random weights; a whole decoder takes as many times
more as it has layers.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch
from model_rows.measure import Measured, apart

from nvila.components.model.config.variants import QWEN_1_5B, VARIANTS
from nvila.components.model.vision.visual import token_count


def rows() -> Iterator[Measured]:
    """One picture of 3 x 4 tiles with three projectors, and 64 frames with three pools."""
    base = VARIANTS["NVILA-8B"]
    projectors = ("mlp2x_gelu", "mlp_downsample", "mlp_downsample_3x3_fix")
    counts = [token_count("image", (3, 4), 17, replace(base, projector=name)) for name in projectors]
    for name, count in zip(("2x2", "3x3"), counts[1:], strict=True):
        yield from _saved(f"picture of 3x4 tiles, {name}", counts[0], count, "no compression")
    video = VARIANTS["NVILA-8B-Video"]
    pools = (1, 4, 8)
    counts = [token_count("video", None, 64, replace(video, video_pool_sizes=((pool, 1, 1),))) for pool in pools]
    for pool, count in zip(pools, counts, strict=True):
        yield from _saved(f"64 frames, temporal pool {pool}", counts[0], count, "no pooling")


def _saved(work: str, plain: int, count: int, what: str) -> Iterator[Measured]:
    yield f"{work}: visual tokens", "tokens", plain, count, what
    for index, (quantity, unit) in enumerate((("prefill, one layer", "s"), ("prefill memory, one layer", "MiB"))):
        yield f"{work}: {quantity}", unit, _prefill(plain)[index], _prefill(count)[index], what


@lru_cache
def _prefill(tokens: int) -> tuple[float, float]:
    """Seconds and MiB of one layer over so many positions, its keys and values kept."""
    from transformers import DynamicCache

    layer = _layer()
    embeds = torch.randn(1, tokens, layer.config.hidden_size, dtype=torch.bfloat16)
    return apart(lambda: layer(inputs_embeds=embeds, past_key_values=DynamicCache(config=layer.config)))


@lru_cache
def _layer() -> Any:
    from transformers import Qwen2Config, Qwen2Model

    config = Qwen2Config(**{**QWEN_1_5B, "num_hidden_layers": 1, "vocab_size": 8})
    return Qwen2Model._from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa").eval()
