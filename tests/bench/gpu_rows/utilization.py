"""MFU of stages 4 and 5 at the widths of NVILA-8B: the whole tower and four decoder blocks."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from gpu_rows.steps import setting, steps

from nvila.components.contracts.gpus import gpu_of

LAYERS = 4
STAGES = (
    ("stage 4, pictures", "nvila-8b", 3, {}, False, 0.45),
    ("stage 5, clips of 256 frames", "nvila-8b-video", 4, {}, True, 0.35),
)
Row = tuple[str, str, float, float, str, float | None]


def rows() -> Iterator[Row]:
    """Seconds that the work takes at the speed that the GPU's maker states, beside those that it took."""
    gpu = gpu_of(torch.cuda.get_device_name())
    if gpu is None:
        raise ValueError(f"the stated speed of {torch.cuda.get_device_name()} is not known")
    for name, recipe, index, changes, video, wanted in STAGES:
        shape, stage, run = setting(recipe, index, LAYERS, changes, {})
        taken = steps(shape, stage, run, 1, video=video)
        work = f"MFU of {name}: NVILA-8B's widths, {LAYERS} decoder blocks, {taken.positions:,} positions a step"
        yield work, "s", taken.operations / gpu.bf16, taken.seconds, f"{gpu.name}'s stated bf16 speed", wanted
