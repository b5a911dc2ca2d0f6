"""Seconds, bytes and work of a stage's optimizer steps on this GPU, by the real engine on the largest batches."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from nvila.components.contracts.environment import Environment, entered, named
from nvila.components.contracts.recipe.form import Form, fill_in
from nvila.components.contracts.recipe.train import Run, Stage
from nvila.components.model.shape import Shape, count
from nvila.components.serve.ports import free_port
from nvila.pipelines.planning.shape import stage_shapes

WARM, STEPS = 3, 8
"""Steps before the clock runs, and those that it measures."""
MOST = 64


@dataclass(frozen=True)
class Measured:
    """Of one optimizer step; memory is the most at any time."""

    seconds: float
    bytes: int
    positions: int
    operations: float


def setting(recipe: str, index: int, layers: int, stage: dict[str, Any], run: dict[str, Any]) -> tuple[Any, ...]:
    """Shape, stage and run of a recipe's stage with so many decoder blocks in this process alone."""
    filled = fill_in(Form(recipe=recipe))
    shape, row = stage_shapes(filled)[index], filled.train.stages[index]
    assert shape and row
    narrow = count(replace(shape.config, llm=shape.config.llm | {"num_hidden_layers": layers}))
    alone = {"gpus": 1, "zero": 0} | run
    return narrow, row.model_copy(update=stage), Run.model_validate(filled.train.run.model_dump() | alone)


def steps(shape: Shape, stage: Stage, run: Run, rows: int, *, video: bool) -> Measured:
    """What a step of `rows` samples a pass takes.

    Raises:
        torch.OutOfMemoryError: the GPU cannot hold it.
    """
    import torch

    from nvila.components.contracts.precisions import PRECISIONS
    from nvila.components.model.batch import Batch
    from nvila.components.model.work import operations
    from nvila.components.train.meter import counted
    from nvila.pipelines.planning.measured import largest_batch, started

    with _alone(), started(shape, stage, run) as (engine, model, packed):
        batch = largest_batch(model, rows, video, packed=packed)
        batch["multiple"] = PRECISIONS[run.precision].multiple
        torch.cuda.reset_peak_memory_stats()
        for step in range(WARM + STEPS):
            if step == WARM:
                torch.cuda.synchronize()
                began = time.perf_counter()
            _, supervised = engine.accumulate(**batch)
            engine.step(supervised)
        torch.cuda.synchronize()
        seconds = (time.perf_counter() - began) / STEPS
        seen = counted(Batch(**batch), model.config, model.tokens)
        work = operations(shape, stage.learning, seen.load(supervised))
        return Measured(seconds, torch.cuda.max_memory_allocated(), int(seen.positions), work)


def most(shape: Shape, stage: Stage, run: Run, *, video: bool) -> int:
    """Samples of a pass that the GPU can hold; more than 64 are not tried."""
    from nvila.pipelines.planning.measured import peak_bytes

    with _alone():
        return max(peak_bytes(shape, stage, run, video, range(1, MOST + 1)))


@contextmanager
def _alone() -> Iterator[None]:
    """As torchrun would start the only process of a job."""
    os.environ |= named(rank=0, local_rank=0, world=1) | {"MASTER_ADDR": "127.0.0.1"}
    os.environ["MASTER_PORT"] = str(free_port("127.0.0.1"))
    with entered(Environment.read()):
        yield
