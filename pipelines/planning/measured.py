"""Measures on this GPU which micro batches of a stage fit: `python -m nvila.pipelines.planning.measured < JSON`.

A model of random weights takes whole steps on ever more samples, each as large as the stage's can be, until the GPU's
memory is full. It is a process of its own: what such a step has left behind is gone with it.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from nvila.components.contracts.environment import Environment, entered
from nvila.components.contracts.precisions import PRECISIONS
from nvila.components.contracts.recipe.recipe import Recipe
from nvila.components.contracts.recipe.train import Run, Stage
from nvila.components.contracts.steps import STAGES
from nvila.components.model.shape import Shape
from nvila.pipelines.planning.fit import sizes
from nvila.pipelines.planning.memory import seen
from nvila.pipelines.planning.shape import stage_shapes

if TYPE_CHECKING:
    from nvila.components.model.config.config import ModelConfig
    from nvila.components.model.nvila import NVILA
    from nvila.components.model.vision.preprocess import Visual
    from nvila.components.train.engine import Engine


def main() -> None:
    """Read which step of which recipe, print bytes by micro batch."""
    import torch

    asked = json.load(sys.stdin)
    recipe = Recipe.model_validate(asked["recipe"])
    index = STAGES.index(asked["step"])
    stage, shape = recipe.train.stages[index], stage_shapes(recipe)[index]
    assert stage and shape
    video = shape.video in seen(recipe, stage, shape)
    with entered(Environment.read()):
        peaks = peak_bytes(shape, stage, recipe.train.run, video, sizes(stage, recipe.train.gpus))
    print(json.dumps({"peaks": peaks, "how": f"measured on {torch.cuda.get_device_name()}"}))


def peak_bytes(shape: Shape, stage: Stage, run: Run, video: bool, wanted: Iterable[int]) -> dict[int, int]:
    """The most bytes of tensors by micro batch, until one does not fit."""
    import torch

    found: dict[int, int] = {}
    with suppress(torch.OutOfMemoryError), started(shape, stage, run) as (engine, model, packed):
        for rows in wanted:
            batch = largest_batch(model, rows, video, packed=packed)
            batch["multiple"] = PRECISIONS[run.precision].multiple
            if torch.cuda.is_available():
                torch.cuda.reset_peak_memory_stats()
            for _ in range(2):  # the second with the optimizer's states
                _, supervised = engine.accumulate(**batch)
                engine.step(supervised)
            found[rows] = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
    return found


@contextmanager
def started(shape: Shape, stage: Stage, run: Run) -> Iterator[tuple[Engine, NVILA, bool]]:
    """The stage's engine in this process alone, around a model of random weights, and whether its rows are packed."""
    import torch

    from nvila.components.model.device import default_device, use_flash_attention, use_packed_attention
    from nvila.components.model.nvila import build_model, empty_model
    from nvila.components.train.engine import leave, start
    from nvila.components.train.tuning import tune

    known, device = empty_model(shape.config), default_device()
    with torch.device(device):
        model = build_model(known.config, known.tokens, getattr(torch, PRECISIONS[run.precision].weights))
    length = min(stage.max_length_tokens, shape.config.max_length_tokens)
    model.config = replace(model.config, max_length_tokens=length)
    tune(model, stage)
    model.prepare_for_training()
    if stage.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    alone = stage.model_copy(update={"batch": 1, "micro_batch": 1})
    engine = start(model, alone, run.model_copy(update={"gpus": 1}), 1000, 1)
    use_flash_attention(model)
    try:
        yield engine, model, run.kernel and use_packed_attention(model)
    finally:
        leave()


def largest_batch(model: NVILA, rows: int, video: bool, *, packed: bool = False) -> dict[str, Any]:
    """Arguments of a forward pass: rows of the longest length, each with its largest medium, all else supervised; if
    packed, all in one row, and with as many media as it has room for."""
    import torch

    from nvila.components.model.text.conversation import IGNORED
    from nvila.components.model.vision.visual import token_count

    config, tokens = model.config, model.tokens
    visuals = _largest_medium(config, video)
    marker = tokens.video if video else tokens.image
    shown = sum(token_count(one.kind, one.block_size, len(one.tiles), config) for one in visuals)
    each = max(1, config.max_length_tokens // (shown + 1)) if packed else 1
    text = max(1, config.max_length_tokens // each - shown)
    samples = rows * each
    ids = torch.full((samples, len(visuals) + text), tokens.newline % tokens.vocabulary, device=model.device)
    ids[:, : len(visuals)] = marker
    labels = ids.clone()
    labels[:, : len(visuals)] = IGNORED
    mask = torch.ones_like(ids, dtype=torch.bool)
    if rows > 1 and not packed:
        mask[-1, -1] = False  # padded, as real rows are
    batch = {"input_ids": ids, "attention_mask": mask, "labels": labels, "visuals": visuals * samples}
    return batch | ({"rows": torch.zeros(samples, dtype=torch.long, device=model.device)} if packed else {})


def _largest_medium(config: ModelConfig, video: bool) -> list[Visual]:
    from PIL import Image

    from nvila.components.model.vision.preprocess import preprocess_image, preprocess_video
    from nvila.components.model.vision.tiling import candidate_grids

    side = config.tile_pixels
    if video:
        return [preprocess_video([Image.new("RGB", (side, side))] * config.sampling.frames, config, pixels=True)]
    columns, rows = max(candidate_grids(1, config.max_tiles), key=lambda grid: grid[0] * grid[1])
    return preprocess_image(Image.new("RGB", (columns * side, rows * side)), config, pixels=True)


if __name__ == "__main__":
    main()
