"""How the samples of a stage will share forward passes, as training works it out for each global batch."""

from __future__ import annotations

import random
from collections.abc import Mapping

from nvila.components.contracts.recipe.train import Run, Stage
from nvila.components.model.shape import Shape
from nvila.components.train.packing import Cost, arrange
from nvila.pipelines.planning.cost import Subset

MOST = 256
"""Samples that are arranged together (`train/windows.py`)."""


def passes(
    shape: Shape, stage: Stage, run: Run, drawn: Mapping[str, int], known: Mapping[str, Subset], *, gpu: bool
) -> str:
    """Which packing, and why, for as many samples as a process has of a global batch.

    Their texts are as long as some of the annotation files; every medium takes its most tokens.
    """
    limit = min(stage.max_length_tokens, shape.config.max_length_tokens)
    rng = random.Random(0)
    share = min(MOST, stage.batch // run.gpus)
    names = rng.choices(list(drawn), weights=[max(number, 1) for number in drawn.values()], k=share)
    lengths = [min(limit, _visual(shape, known[name]) + round(rng.choice(known[name].texts))) for name in names]
    cost = Cost.of(shape.config.llm, gpu=gpu, kernel=gpu and run.kernel)
    chosen = arrange(lengths, stage.samples_at_once(run.gpus), limit, cost, run.arranged)
    return f"{chosen.words}; {share} samples in {len(chosen.passes)} passes"


def _visual(shape: Shape, subset: Subset) -> int:
    return (shape.video if subset.kind == "video" else shape.image).tokens
