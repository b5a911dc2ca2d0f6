"""Layer norms and LoRA beside LoRA on both parts, and how large an adapter is. By hand:

    .venv/bin/python tests/bench/train_rows/tuning.py

Four computed blocks of SigLIP-so400m's widths and four of Qwen2.5-1.5B's; four pictures of ten tiles of 112 pixels (64
tokens in the tower, 9 behind it), bf16, rank 64, dropout 0.05, one process and thread, CPU time. Both engines take
their steps in turns. Sizes of adapters are those of the whole models: counts, at two bytes a weight.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from statistics import median
from typing import Any

import torch

from nvila.components.model.learning import adapters, trained
from nvila.components.model.shape import count

sys.path.insert(0, str(Path(__file__).parent))
overhead: Any = import_module("overhead")

STEPS, BLOCKS, SAMPLES, TILES, TILE_PIXELS = 3, 4, 4, 10, 112
FASTER, SMALLER = 1.15, 100.0
VARIANT = "NVILA-Lite-2B"
WAYS = {"LoRA + LoRA": "lora", "layer norms + LoRA": "layernorm"}
"""How the tower learns; the decoder by LoRA in both."""
Row = tuple[str, str, float, float, str, float | None]


def rows() -> Iterator[Row]:
    """Seconds of an iteration, then bytes of adapters."""
    found = {name: median(taken) for name, taken in _seconds().items()}
    baseline, ours = found.values()
    work = (
        f"iteration of layer norms (tower) + LoRA (decoder), {SAMPLES} pictures of {TILES} tiles, {BLOCKS} blocks each"
    )
    yield work, "CPU s", baseline, ours, "LoRA on both, the same engine", FASTER
    for rank in (64, 16):
        base, adapter, kept = _bytes(rank)
        yield f"adapter of rank {rank}, {VARIANT}", "MB", base / 1e6, adapter / 1e6, "the model", SMALLER
        yield (
            f"weights in a checkpoint, with the projector, rank {rank}",
            "MB",
            base / 1e6,
            kept / 1e6,
            "the model",
            None,
        )


def _stage(tower: str, rank: int = 64) -> Any:
    from nvila.components.contracts.recipe.train import Stage

    stage = {"name": "bench", "trainable": ["vision_tower", "mm_projector", "llm"], "learning_rate": 1e-4}
    stage |= {"methods": {"vision_tower": tower, "llm": "lora"}, "lora": {"rank": rank}}
    return Stage.model_validate(stage | {"data": {"a.sft": 1}, "batch": SAMPLES, "warmup_ratio": 0.0})


def _bytes(rank: int) -> tuple[int, int, int]:
    """Of the whole model, of the decoder's adapter, and of what a checkpoint keeps of the weights."""
    from nvila.components.model.config.variants import VARIANTS

    shape, stage = count(VARIANTS[VARIANT]), _stage("layernorm", rank)
    return 2 * shape.total, 2 * adapters(shape, stage), 2 * sum(trained(shape, stage).values())


def _seconds() -> dict[str, list[float]]:
    """CPU seconds of each iteration after the first."""
    from nvila.pipelines.planning.measured import largest_batch

    overhead.alone()
    engines = {name: _started(tower) for name, tower in WAYS.items()}
    taken: dict[str, list[float]] = {name: [] for name in WAYS}
    for step in range(STEPS + 1):
        for name, engine in engines.items():
            batch = largest_batch(engine.deepspeed.module, SAMPLES, False)
            assert sum(len(visual.tiles) for visual in batch["visuals"]) == SAMPLES * TILES
            began = time.process_time()
            _, weight = engine.accumulate(**batch)
            engine.step(weight)
            if step:
                taken[name].append(time.process_time() - began)
    return taken


def _started(tower: str) -> Any:
    """Our engine around a model of random weights."""
    from nvila.components.contracts.recipe.train import Run
    from nvila.components.model.config.variants import VARIANTS
    from nvila.components.model.device import use_float32_products
    from nvila.components.model.nvila import build_model, empty_model
    from nvila.components.train.engine import start
    from nvila.components.train.tuning import tune

    config = VARIANTS[VARIANT]
    vision = {
        **config.vision,
        "num_hidden_layers": BLOCKS + 1,
        "image_size": TILE_PIXELS,
    }  # of which the last is unused
    llm = {**config.llm, "num_hidden_layers": BLOCKS}
    config = replace(
        config, vision=vision, llm=llm, s2_scales=(TILE_PIXELS,), max_tiles=TILES - 1, max_length_tokens=160
    )
    known, stage = empty_model(config), _stage(tower)
    torch.manual_seed(0)
    model = build_model(known.config, known.tokens, torch.bfloat16)
    tune(model, stage)
    use_float32_products(model)
    model.prepare_for_training()
    return start(model, stage, Run(precision="bf16"), 1000, 1)


def main() -> None:
    """Each iteration, and the sizes."""
    for name, taken in _seconds().items():
        print(f"{name}: {', '.join(f'{one:.1f}' for one in taken)} CPU s an iteration, median {median(taken):.2f}")
    for rank in (64, 16):
        base, adapter, kept = _bytes(rank)
        of = f"the model's {base / 1e9:.2f} GB"
        print(f"rank {rank}: adapter {adapter / base:.2%} of {of}, with norms and projector {kept / base:.2%}")


if __name__ == "__main__":
    main()
