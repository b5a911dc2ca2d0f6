"""`nvila plan RECIPE --fit`: the largest micro batch of each stage that one GPU holds, measured where there is one.

It is measured by the stage's own engine in a process of its own (`planning.measured`) on the largest samples, and
computed elsewhere by the formula of `planning.memory`.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from nvila.components.contracts.environment import for_child, named
from nvila.components.contracts.gpus import Gpu
from nvila.components.contracts.recipe.recipe import Recipe
from nvila.components.contracts.recipe.train import Stage
from nvila.components.contracts.steps import STAGES
from nvila.components.model.shape import Shape
from nvila.components.serve.ports import free_port
from nvila.pipelines.planning.memory import RESERVE_BYTES, need


@dataclass(frozen=True)
class Fit:
    """Of one stage."""

    step: str
    now: int
    """Samples that the recipe has a GPU take at once."""
    most: int | None
    """That fit; None where not even one does."""
    peak_bytes: int | None
    """Of so many: of the tensors, beside what CUDA and its libraries take."""
    how: str
    """`measured on` which GPU, or `computed for` which one, and why."""


def fits(recipe: Recipe, shape: Shape | None, gpu: Gpu) -> list[Fit]:
    """Of all stages; none where the sizes of the model are not known."""
    stages = zip(STAGES, recipe.train.stages, strict=False)
    return [_fit(step, stage, recipe, shape, gpu) for step, stage in stages if stage] if shape else []


def sizes(stage: Stage, processes: int) -> list[int]:
    """Micro batches that share the global batch evenly, the smallest first."""
    return [size for size in range(1, stage.batch // processes + 1) if stage.batch % (size * processes) == 0]


def computed(stage: Stage, recipe: Recipe, shape: Shape, gpu: Gpu) -> dict[int, int]:
    """Bytes at the peak of the micro batches that fit."""
    wanted = {size: stage.model_copy(update={"micro_batch": size}) for size in sizes(stage, recipe.train.gpus)}
    peaks = {size: need(recipe, taken, shape).peak for size, taken in wanted.items()}
    return {size: peak for size, peak in peaks.items() if peak + RESERVE_BYTES <= gpu.memory_bytes}


def _fit(step: str, stage: Stage, recipe: Recipe, shape: Shape, gpu: Gpu) -> Fit:
    why = _not_measured(recipe)
    if why is None:
        try:
            told = _measured(step, recipe)
            return _of(step, stage, recipe, {int(size): peak for size, peak in told["peaks"].items()}, told["how"])
        except (OSError, ValueError, LookupError) as error:
            why = f"measuring failed: {error}"
    return _of(step, stage, recipe, computed(stage, recipe, shape, gpu), f"computed for {gpu.name}: {why}")


def _of(step: str, stage: Stage, recipe: Recipe, peaks: Mapping[int, int], how: str) -> Fit:
    most = max(peaks, default=None)
    return Fit(step, stage.samples_at_once(recipe.train.gpus), most, peaks[most] if most else None, how)


def _not_measured(recipe: Recipe) -> str | None:
    """Why it cannot be; None where it can."""
    import torch

    if not torch.cuda.is_available():
        return "there is no GPU here"
    if recipe.train.gpus > 1 and recipe.train.zero:
        return f"one GPU cannot hold its share of what ZeRO {recipe.train.zero} parts among {recipe.train.gpus}"
    return None


def _measured(step: str, recipe: Recipe) -> dict[str, Any]:
    """What `planning.measured` prints last.

    Raises:
        ValueError: it ended without.
    """
    alone = named(rank=0, local_rank=0, world=1) | {"MASTER_ADDR": "127.0.0.1"}
    alone["MASTER_PORT"] = str(free_port("127.0.0.1"))
    asked = json.dumps({"step": step, "recipe": recipe.model_dump(mode="json")})
    command = [sys.executable, "-m", "nvila.pipelines.planning.measured"]
    ended = subprocess.run(command, input=asked, capture_output=True, text=True, env=for_child(alone), check=False)
    if ended.returncode:
        lines = ended.stderr.strip().splitlines()
        raise ValueError(lines[-1] if lines else f"it ended with {ended.returncode}")
    return json.loads(ended.stdout.strip().splitlines()[-1])  # type: ignore[no-any-return]
