"""A checkpoint as a stage of training changes it before it is loaded: frames, pooling, longest row, time tokens."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from nvila.components.contracts.errors import ConfigError
from nvila.components.contracts.projectors import projection
from nvila.components.data.sampling import Sampling
from nvila.components.model.checkpoint.layouts import Checkpoint
from nvila.components.model.checkpoint.tensorfile import DTYPES, put, values
from nvila.components.model.checkpoint.weights import EMBEDDINGS, HEAD, Source
from nvila.components.model.config.config import with_vocabulary

if TYPE_CHECKING:
    from nvila.components.contracts.recipe.changes import ModelChanges
    from nvila.components.model.checkpoint.tensorfile import Stored
    from nvila.components.model.config.config import ModelConfig


def changed(checkpoint: Checkpoint, changes: ModelChanges) -> Checkpoint:
    """The checkpoint after the changes; what they do not speak of stays.

    Raises:
        ConfigError: it has another number of time tokens, or a configuration comes out that is not computed.
    """
    return _timed(replace(checkpoint, config=reconfigured(checkpoint.config, changes)), changes.time_tokens or 0)


def reconfigured(config: ModelConfig, changes: ModelChanges) -> ModelConfig:
    """The configuration after the changes, but for time tokens.

    Raises:
        ConfigError: one comes out that is not computed.
    """
    video = changes.video
    sampling = Sampling(
        config.sampling.frames if video.frames is None else video.frames,
        config.sampling.fps if video.fps is None else video.fps,
    )
    pools = config.video_pool_sizes if video.pool_sizes is None else tuple((t, h, w) for t, h, w in video.pool_sizes)
    if (sampling.frames, pools) != (config.sampling.frames, config.video_pool_sizes):
        _require_even_pools(config, sampling.frames, pools)
    length = changes.max_length_tokens or config.max_length_tokens
    return replace(config, sampling=sampling, video_pool_sizes=pools, max_length_tokens=length)


def _require_even_pools(config: ModelConfig, frames: int, pools: Iterable[tuple[int, int, int]]) -> None:
    """Each pool divides the frames, and the tokens of a frame; with S2 these depend on the scales as well."""
    side = None if config.is_s2 else projection(config.projector).side(config.features_per_side)
    for time, rows, columns in pools:
        if frames % time or (side and (side % rows or side % columns)):
            tokens = f" of {side} x {side} tokens" if side else ""
            why = f"does not divide {frames} frames{tokens}"
            raise ConfigError(f"a pool {why}", where="video.pool_sizes", value=(time, rows, columns))


def _timed(checkpoint: Checkpoint, number: int) -> Checkpoint:
    from nvila.components.model.text.timetokens import time_token_ids
    from nvila.components.model.text.tokenizer import TokenIds

    if not number:
        return checkpoint
    tokenizer = checkpoint.load_tokenizer()
    there = len(time_token_ids(tokenizer))
    if there and there != number:
        raise ConfigError(
            f"the model has {there} time tokens, which mean other times",
            where=str(checkpoint.folder),
            value=number,
            do=f"Leave the stage's model.time_tokens out, or say {there}",
        )
    new = number - there
    config = with_vocabulary(checkpoint.config, TokenIds.of(tokenizer).vocabulary + new)
    return replace(checkpoint, config=replace(config, time_tokens=number), new_tokens=new)


def with_new_rows(tensors: Mapping[str, Stored], old: int, new: int) -> dict[str, Source]:
    """Embeddings and output layer with `new` rows behind the `old` ones, each the mean of these, as in the reference;
    rows that pad the vocabulary are dropped."""
    grown: dict[str, Source] = dict(tensors)
    for name in (EMBEDDINGS, HEAD) if new else ():
        stored = tensors.get(name)
        if stored is None or len(stored.shape) != 2 or stored.shape[0] < old:  # `weights.check` says it
            continue
        width = stored.shape[1]
        rows = torch.empty(old + new, width, dtype=DTYPES[stored.code])
        put(rows[:old].view(-1), values(stored, name, old * width, rows.dtype))
        rows[old:] = rows[:old].mean(dim=0, dtype=torch.float32)
        grown[name] = rows
    return grown
