"""`nvila fp8 doctor`: what FP8 gains in each stage of a recipe, Linear by Linear, and what stays in bf16, and why."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any

from rich.console import Console
from rich.table import Table

from nvila.components.contracts.errors import ConfigError
from nvila.components.contracts.gpus import GPUS, Gpu
from nvila.components.contracts.precisions import PRECISIONS
from nvila.components.contracts.recipe.recipe import Recipe
from nvila.components.contracts.recipe.train import Stage
from nvila.components.contracts.steps import STAGES
from nvila.components.model.shape import Shape
from nvila.components.tracking.redact import tell
from nvila.pipelines.commands.overrides import asked_for
from nvila.pipelines.planning.fit import computed
from nvila.pipelines.planning.layers import Layer, layers, whole
from nvila.pipelines.planning.memory import largest, seen
from nvila.pipelines.planning.shape import is_small, stage_shapes
from nvila.pipelines.planning.timing import MOST_ON_A_CPU, Times, bound, measured
from nvila.pipelines.show.watch import print_line

FORMULA = """\
gain of a product: its seconds in bf16 by those in FP8; of a Linear the same for all its products and its casts
gain of a step: 1 / (1 - p + p / s), p the share of the step's operations that FP8 takes (of all parts and attention),
s what their Linears gain together; all else is taken to run as fast, operation by operation, as these do in bf16
bound: of a product the longer one of its operations at the GPU's stated speed and its bytes through the GPU's memory;
casts read each tensor once and write it by row, and by column where a gradient needs that. No GPU is faster than it"""


@dataclass(frozen=True)
class Verdict:
    """Of one stage; times are of the largest micro batch."""

    step: str
    layers: list[Layer]
    times: list[Times | None]
    """Of each; None where a size is not divisible by 16, so that no kernel takes it in FP8."""
    share: float
    """Of the step's operations those that FP8 takes."""
    gain: float
    """Of the whole step, in times as fast."""
    micro_batch: dict[str, int | None]
    """The largest that fits the GPU by the plan's formula, in bf16 and in FP8; None where not even one sample does."""


@dataclass(frozen=True)
class Diagnosis:
    """Of a recipe."""

    recipe: str
    precision: str
    how: str
    """`measured on` what, or `bound for` which GPU, and why."""
    gpu: str
    """Whose memory the micro batches are for."""
    stages: list[Verdict]


def diagnose(recipe: str, overrides: Iterable[str], gpu: str) -> Diagnosis:
    """Work it out; a recipe in another precision is looked at as if it said fp8-current.

    Raises:
        ConfigError: the recipe or an option is wrong, or the sizes of the model are not known.
    """
    if gpu not in GPUS or not GPUS[gpu].fp8:
        known = ", ".join(name for name, one in GPUS.items() if one.fp8)
        raise ConfigError("no such GPU, or it has no products in FP8", where="--gpu", value=gpu, do=f"Known: {known}.")
    _, asked = asked_for(recipe, overrides)
    if not PRECISIONS[asked.train.precision].fp8:
        asked = asked.model_copy(update={"train": asked.train.model_copy(update={"precision": "fp8-current"})})
    shapes = stage_shapes(asked)
    if None in shapes:
        raise ConfigError("the sizes of the weights that model.base names are not known", where="model.base")
    how, time_of = _timer(asked, GPUS[gpu], is_small(asked, shapes[0]))
    stages = zip(STAGES, asked.train.stages, shapes, strict=False)
    found = [
        _verdict(step, stage, asked, shape, GPUS[gpu], time_of) for step, stage, shape in stages if stage and shape
    ]
    return Diagnosis(asked.name, asked.train.precision, how, gpu, found)


def _timer(recipe: Recipe, gpu: Gpu, small: bool) -> tuple[str, Any]:
    """How times are found, in words, and by what."""
    import torch

    run = recipe.train.run
    if torch.cuda.is_available():
        return f"measured on {torch.cuda.get_device_name()}", cache(lambda layer: measured(layer, run))
    if small and run.precision == "fp8-current":
        most = f"products of at most {MOST_ON_A_CPU:,} positions"
        words = f"measured on this CPU, {most}: that FP8 runs here, and nothing about a GPU"
        return words, cache(lambda layer: measured(layer, run))
    return f"bound for {gpu.name}, not measured: there is no GPU here", cache(lambda layer: bound(layer, gpu))


def _verdict(step: str, stage: Stage, recipe: Recipe, shape: Shape, gpu: Gpu, time_of: Any) -> Verdict:
    run = recipe.train.run
    batch = max(largest(shape, stage, run, seen(recipe, stage, shape)), key=lambda one: one.supervised)
    found = layers(shape, stage, run, batch)
    times = [time_of(layer) if all(size % 16 == 0 for size in layer.features) else None for layer in found]
    pairs = [(layer, one) for layer, one in zip(found, times, strict=True) if layer.stays is None and one]
    share = sum(layer.operations for layer, _ in pairs) / whole(shape, stage, batch)
    bf16, fp8 = (sum(layer.count * getattr(one.layer, name) for layer, one in pairs) for name in ("bf16", "fp8"))
    plain = recipe.model_copy(update={"train": recipe.train.model_copy(update={"precision": "bf16"})})
    fitting = {
        name: max(computed(stage, one, shape, gpu), default=None)
        for name, one in (("bf16", plain), (run.precision, recipe))
    }
    gain = 1 / (1 - share + share * fp8 / bf16) if pairs else 1.0
    return Verdict(step, found, times, share, gain, fitting)


def as_json(found: Diagnosis) -> dict[str, Any]:
    """For programs: seconds, operations and counts as numbers."""
    return asdict(found)


def show(found: Diagnosis, console: Console) -> None:
    """For a person: stages that are alike are shown once."""
    shown: dict[Any, list[Verdict]] = {}
    for one in found.stages:
        shown.setdefault((tuple(one.layers), repr(one.times)), []).append(one)
    for alike in shown.values():
        console.print(_table(alike, found))
        for line in _lines(alike, found):
            print_line(console, tell(line))
        print_line(console, "")
    print_line(console, tell(f"{found.how}; {found.precision}"))
    for line in FORMULA.splitlines():
        print_line(console, line)


def _table(alike: list[Verdict], found: Diagnosis) -> Table:
    title = f"{found.recipe}, {', '.join(one.step for one in alike)}: FP8 in times as fast as bf16"
    table = Table(box=None, pad_edge=False, title=title, title_justify="left")
    table.add_column("Linear", no_wrap=True)
    for name in ("number", "out x in", "positions", "forward", "input gradient", "weight gradient", "with casts"):
        table.add_column(name, justify="right")
    table.add_column("", no_wrap=True)
    first = alike[0]
    for layer, times in zip(first.layers, first.times, strict=True):
        gains = [""] * 4
        if times:
            kinds = ("forward", "input gradient", "weight gradient")
            gains = [f"{times.products[kind].gain:.2f}" if kind in times.products else "" for kind in kinds]  # type: ignore[index]
            gains.append(f"{times.layer.gain:.2f}")
        size = " x ".join(f"{features:,}" for features in layer.features)
        table.add_row(
            layer.name, f"{layer.count}", size, f"{layer.positions:,}", *gains, layer.stays and f"bf16: {layer.stays}"
        )
    return table


def _lines(alike: list[Verdict], found: Diagnosis) -> Iterator[str]:
    first = alike[0]
    if not first.share:
        yield "FP8 takes no Linear here: a run would be refused"
        return
    yield f"FP8 takes {first.share:.0%} of the operations; the whole step {first.gain:.2f} times as fast"
    sizes = {tuple(one.micro_batch.items()) for one in alike}
    if len(sizes) == 1:
        said = ", ".join(f"{name} {size or 'none'}" for name, size in first.micro_batch.items())
        yield f"largest micro batch that fits one {found.gpu} by the plan's formula: {said}"
        return
    for one in alike:
        said = ", ".join(f"{name} {size or 'none'}" for name, size in one.micro_batch.items())
        yield f"{one.step}: largest micro batch that fits one {found.gpu} by the plan's formula: {said}"
