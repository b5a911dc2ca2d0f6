"""From tiles to the embeddings that replace media tokens: tower, scales, projector, pooling, line breaks.

Plain torch, shared by the torch model and the vLLM plugin: the tower is any callable.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch

from nvila.components.model.config.config import ModelConfig
from nvila.components.model.vision.pooling import temporal_pool
from nvila.components.model.vision.preprocess import BlockSize, Kind, Visual, normalise
from nvila.components.model.vision.projector import projected_side
from nvila.components.model.vision.s2 import (
    merge_chessboard,
    merged_parts,
    output_blocks,
    projector_blocks,
    tiles_per_unit,
)

Tower = Callable[[torch.Tensor], torch.Tensor]
"""(T, 3, S, S) normalised tiles to (T, N, C) features."""
Lengths = tuple[int, int, int]
"""Tokens of the marks of a video: before a frame, behind it, behind a scale."""
Group = tuple[Kind, BlockSize | None, int]
"""Visuals that can share tensor operations: kind, block size, number of tiles."""


@dataclass(frozen=True)
class VideoMarks:
    """Embeddings (n, H) put around the pooled frames of a video."""

    start: torch.Tensor
    """Before each frame."""
    end: torch.Tensor
    """Behind each frame."""
    sep: torch.Tensor
    """Behind each pooling scale."""


def encode_visuals(
    vision_tower: Tower,
    projector: Callable[[torch.Tensor], torch.Tensor],
    newline: torch.Tensor,
    visuals: Sequence[Visual],
    config: ModelConfig,
    marks: VideoMarks | None = None,
) -> list[torch.Tensor]:
    """Embedding sequence of each visual.

    One tower call for all; what follows runs once per group of equal shape.

    Args:
        vision_tower: (T, 3, S, S) to (T, N, C); it sees the tiles in the dtype and on the device of `newline`.
        projector: (B, N, D) to (B, n, H).
        newline: (H,) the embedding of a line break, put after each picture and each pooled frame.
        visuals: pictures and videos in any order.
        config: the architecture.
        marks: what stands around a video's frames; None for `newline` behind each.

    Returns:
        (n_i, H) of each visual, in the order given.
    """
    if not visuals:
        return []
    groups = _group(visuals)
    features = _features(vision_tower, [visuals[i] for members in groups.values() for i in members], newline)
    sizes = [len(members) * tiles_each for (_, _, tiles_each), members in groups.items()]
    projected = _project(projector, list(zip(groups, features.split(sizes), strict=True)), config)
    nothing = newline.new_zeros(0, len(newline))
    around = marks if marks is not None else VideoMarks(nothing, newline[None], nothing)
    encoded: dict[int, torch.Tensor] = {}
    for ((kind, block, _), members), part in zip(groups.items(), projected, strict=True):
        tokens = _whole_map(part, projector_blocks(block, config)).unflatten(0, (len(members), -1))
        sequences = _video(tokens, around, config) if kind == "video" else _end(tokens, newline).flatten(1, 2)
        encoded.update(zip(members, sequences.unbind(0), strict=True))
    return [encoded[i] for i in range(len(visuals))]


def _features(vision_tower: Tower, visuals: Sequence[Visual], like: torch.Tensor) -> torch.Tensor:
    """(T, N, C) of all tiles: those that come with the visuals where all do, else of one tower call."""
    known = [visual.features for visual in visuals if visual.features is not None]
    if len(known) == len(visuals):
        return torch.cat(known).to(like)
    tiles = torch.cat([visual.tiles for visual in visuals])
    return vision_tower(normalise(tiles.to(like.device)).to(like.dtype))


def _project(
    projector: Callable[[torch.Tensor], torch.Tensor], parts: Sequence[tuple[Group, torch.Tensor]], config: ModelConfig
) -> list[torch.Tensor]:
    """(B, n, H) of each group's (tiles, N, C) features.

    With gradients the projector is called once for everything: under ZeRO-3 each call gathers its weights, and ranks
    must agree on their number. Without, it is called for a part at a time, which takes a fraction of the memory.
    """
    merged = [
        merged_parts(features.unflatten(0, (-1, tiles_per_unit(block, config))), block, config)
        for (_, block, _), features in parts
    ]
    if not torch.is_grad_enabled():
        return [torch.cat([projector(blocks) for blocks in group]) for group in merged]
    whole = [torch.cat(list(group)) for group in merged]
    return list(projector(torch.cat(whole)).split([len(blocks) for blocks in whole]))


def token_count(
    kind: Kind, block_size: BlockSize | None, tiles: int, config: ModelConfig, marks: Lengths = (0, 1, 0)
) -> int:
    """Length of the embedding sequence of a visual of this shape, line breaks or `marks` included."""
    rows, columns = projector_blocks(block_size, config)
    tiles_per_side = output_blocks(block_size, config)[0] // rows
    side = projected_side(config.projector, tiles_per_side * config.features_per_side)
    tokens = rows * columns * side * side
    if kind == "image":
        return tokens + 1
    frames = tiles // tiles_per_unit(block_size, config)
    start, end, sep = marks
    each = start + end
    return sum(-(-frames // pt) * (tokens // (ph * pw) + each) + sep for pt, ph, pw in config.video_pool_sizes)


def _group(visuals: Iterable[Visual]) -> dict[Group, list[int]]:
    groups: dict[Group, list[int]] = {}
    for index, visual in enumerate(visuals):
        groups.setdefault((visual.kind, visual.block_size, len(visual.tiles)), []).append(index)
    return groups


def _whole_map(blocks: torch.Tensor, grid: BlockSize) -> torch.Tensor:
    """(U * rows * columns, n, H) projected blocks to (U, rows * columns * n, H), row by row over the whole map."""
    if grid == (1, 1):
        return blocks
    side = round(blocks.shape[1] ** 0.5)
    return merge_chessboard(blocks.unflatten(1, (side, side)), *grid).flatten(1, 2)


def _end(tokens: torch.Tensor, newline: torch.Tensor) -> torch.Tensor:
    """(V, U, n, H) to (V, U, n + 1, H): a line break after each picture or frame."""
    return torch.cat([tokens, newline.expand(*tokens.shape[:2], 1, -1)], dim=2)


def _video(tokens: torch.Tensor, marks: VideoMarks, config: ModelConfig) -> torch.Tensor:
    """(V, frames, n, H) to (V, length, H): pooled frames of every pool size between their marks."""
    parts = []
    for scale in temporal_pool(tokens, config.video_pool_sizes):
        start, end = (mark.expand(*scale.shape[:2], -1, -1) for mark in (marks.start, marks.end))
        parts += [torch.cat([start, scale, end], dim=2).flatten(1, 2), marks.sep.expand(len(scale), -1, -1)]
    return torch.cat(parts, dim=1)
