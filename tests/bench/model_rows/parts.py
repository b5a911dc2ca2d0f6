"""Vision tower, S2 merge and projector at real sizes, with random weights."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from model_rows.measure import Measured, apart, pair
from torch.nn import functional as F

from nvila.components.model.config.variants import SIGLIP, VARIANTS
from nvila.components.model.vision.preprocess import Visual
from nvila.components.model.vision.projector import build_projector
from nvila.components.model.vision.tower import tower_features
from nvila.components.model.vision.visual import encode_visuals


def rows() -> Iterator[Measured]:
    """The tower without its last block, and what follows it."""
    yield _tower()
    yield from _merge_and_project()


def _tower() -> Measured:
    """Width and patches of SigLIP so400m at 9 of its 27 blocks, so that one block is a ninth."""
    from transformers import SiglipVisionConfig, SiglipVisionModel

    layers = 9
    config = SiglipVisionConfig(**{**SIGLIP, "num_hidden_layers": layers, "image_size": 224})
    tower: Any = SiglipVisionModel(config).eval()
    tiles = torch.randn(1, 3, 224, 224)
    whole = tower(tiles, output_hidden_states=True).hidden_states[-2]
    assert torch.allclose(whole, tower_features(tower, tiles, -2), atol=1e-4)
    taken = pair(lambda: tower(tiles), lambda: tower_features(tower, tiles, -2))
    work = f"tower at layer -2, {layers} blocks, one tile of 224"
    return work, "s", *taken, "all blocks; features equal", layers / (layers - 1)


def _merge_and_project() -> Iterator[Measured]:
    """One picture of NVILA-8B: 17 tiles in three scales to 3072 tokens of 3584 values."""
    config = VARIANTS["NVILA-8B"]
    rows, columns, side = 3, 4, config.features_per_side
    features = torch.randn(5 + rows * columns, side * side, config.vision["hidden_size"])
    projector = build_projector(config.projector, config.mm_hidden_size, config.llm_hidden_size).eval()
    newline = torch.zeros(config.llm_hidden_size)
    visual = Visual("image", torch.zeros(len(features), 3, 1, 1), (rows, columns))

    def plain() -> torch.Tensor:
        maps, start = [], 0
        for r, c in ((1, 1), (2, 2), (rows, columns)):
            board = features[start : start + r * c].reshape(r, c, side, side, -1).permute(4, 0, 2, 1, 3)
            start += r * c
            area = board.reshape(1, -1, side * r, side * c)
            maps.append(F.interpolate(area, size=(side * rows, side * columns), mode="area"))
        stacked = torch.cat(maps, dim=1)[0]
        blocks = stacked.reshape(-1, rows, side, columns, side).permute(1, 3, 2, 4, 0)
        tokens = projector(blocks.reshape(rows * columns, side * side, -1))
        half = side // 2
        board = tokens.reshape(rows, columns, half, half, -1).permute(0, 2, 1, 3, 4)
        return torch.cat([board.reshape(rows * half * columns * half, -1), newline[None]])

    def ours() -> torch.Tensor:
        return encode_visuals(lambda _: features, projector, newline, [visual], config)[0]

    assert torch.allclose(plain(), ours(), atol=1e-4)
    what = "interpolate, concatenate, cut, project, join; tokens equal"
    work = "S2 merge and projection of one picture, NVILA-8B"
    yield (work, "s", *pair(plain, ours, 2), what, 1.0)
    yield (f"{work}: memory", "MiB", apart(plain)[1], apart(ours)[1], what, 2.0)
