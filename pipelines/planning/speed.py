"""How fast this machine computes a small model: as its own training stages in the store did, or as a product tells."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from nvila.components.contracts.environment import current
from nvila.components.contracts.errors import NvilaError
from nvila.components.contracts.manifest import MANIFEST, Manifest
from nvila.components.contracts.precisions import Precision
from nvila.components.contracts.recipe.prune import PruneSettings
from nvila.components.contracts.recipe.train import Stage
from nvila.components.contracts.results.model import Training
from nvila.components.contracts.steps import STAGES
from nvila.components.model.shape import Shape
from nvila.components.runner.work import machine
from nvila.pipelines.planning.cost import Subset, samples_of, stage_work
from nvila.pipelines.planning.shape import shape_at

SHARE_REACHED = 0.2
"""Of the speed of a large product in fp32: the stages of `tiny`, whose matrices are small, reached 0.15 to 0.22."""
PRODUCT_SECONDS = 0.2


@dataclass(frozen=True)
class Speed:
    """Of this machine, all its cores together."""

    operations_a_second: float
    evidence: str
    """Where the number comes from, in words."""


def speed_here(shape: Shape, known: Mapping[str, Subset], store: Path, precision: Precision) -> Speed:
    """What was measured of stages of this very architecture in this precision; without any, a guess from a matrix
    product made now."""
    work = seconds = 0.0
    steps = []
    for stage, told in _finished(shape, store, precision):
        drawn = samples_of(Stage.model_validate(told.stage), known, PruneSettings())
        if drawn and (whole := sum(drawn.values())):
            operations, _ = stage_work(shape, Stage.model_validate(told.stage), drawn, known)
            work += operations * told.samples / whole
            seconds += stage.seconds
            steps.append(stage.step)
    if seconds:
        return Speed(work / seconds, f"{', '.join(steps)} of the store told, which took {seconds:.0f} s")
    return Speed(
        SHARE_REACHED * _product(machine(current().threads)["threads"]),
        f"a matrix product in fp32 tells, of whose speed small models reach about {SHARE_REACHED}",
    )


def _finished(shape: Shape, store: Path, precision: Precision) -> Iterator[tuple[Manifest, Training]]:
    """The newest work of each stage by this machine on a model of the same architecture, whatever its vocabulary."""
    here = machine(current().threads)
    for step in STAGES:
        manifests = list((store / step).glob(f"*/{MANIFEST}"))
        for path in sorted(manifests, key=lambda path: path.stat().st_mtime, reverse=True):
            try:
                manifest = Manifest.load(path)
                told = manifest.told(Training)
            except NvilaError:  # of an older version, or damaged: the run says so
                continue
            alike = manifest.machine == here and told.precision == precision
            own = shape_at(str(path.parent / "model")) if alike else None
            if own and _sizes(own) == _sizes(shape):
                yield manifest, told
                break


def _sizes(shape: Shape) -> object:
    sizes = ("hidden_size", "num_hidden_layers", "intermediate_size", "patch_size")
    parts = [[part.get(name) for name in sizes] for part in (shape.config.vision, shape.config.llm)]
    return parts, shape.parameters["mm_projector"], shape.image, shape.video


def _product(threads: int) -> float:
    """Floating-point operations a second of matrix products in fp32 on so many threads: the fastest of many on one,
    for what else works here would be measured too."""
    import torch

    side, before = 512, torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        left, right = torch.ones(side, side), torch.ones(side, side)
        fastest, until = math.inf, time.perf_counter() + PRODUCT_SECONDS
        while (began := time.perf_counter()) < until:
            left @ right
            fastest = min(fastest, time.perf_counter() - began)
    finally:
        torch.set_num_threads(before)
    return threads * 2 * side**3 / fastest
