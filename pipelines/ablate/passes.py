"""How often a stage passes over its data, so that subsets are trained on for one epoch each, or for equal steps."""

from __future__ import annotations

from collections.abc import Mapping

from nvila.components.contracts.recipe.train import Stage

Sizes = Mapping[str, int]
"""Samples by subset (`source.split`)."""


def one_epoch(stage: Stage, whole: Sizes, kept: Sizes) -> Stage:
    """The recipe's passes over what stays; of what is not pruned (captions) the same share, so that the mixture stays
    what it was."""
    share = _visits(stage, kept, pruned=True) / _visits(stage, whole, pruned=True) if _pruned(stage) else 1.0
    return _with(
        stage, {name: times if name in _pruned(stage) else times * share for name, times in stage.data.items()}
    )


def equal_steps(stage: Stage, whole: Sizes, kept: Sizes, steps: int) -> Stage:
    """As many passes as make `steps` optimizer steps, in the mixture of the whole data."""
    samples = (steps + 0.5) * stage.batch  # rounding a subset to whole samples must not make or lose a batch
    everything = _visits(stage, whole, pruned=None)
    rest = samples / everything
    pruned = rest * _visits(stage, whole, pruned=True) / (_visits(stage, kept, pruned=True) or 1.0)
    return _with(stage, {n: times * (pruned if n in _pruned(stage) else rest) for n, times in stage.data.items()})


def steps_of(stage: Stage, sizes: Sizes) -> int:
    """Optimizer steps of a stage over subsets of these sizes."""
    drawn = 0
    for name, times in stage.data.items():
        whole, rest = divmod(times, 1.0)
        drawn += int(whole) * sizes[name] + round(rest * sizes[name])
    return drawn // stage.batch


def _pruned(stage: Stage) -> set[str]:
    """The subsets of which only a part stays."""
    return {name for name in stage.data if stage.pruned and name.endswith(".sft")}


def _visits(stage: Stage, sizes: Sizes, pruned: bool | None) -> float:
    chosen = [n for n in stage.data if pruned is None or (n in _pruned(stage)) is pruned]
    return sum(stage.data[name] * sizes[name] for name in chosen)


def _with(stage: Stage, data: Mapping[str, float]) -> Stage:
    return stage.model_copy(update={"data": dict(data)})
