"""What `nvila finetune` adds to a recipe: the model to start from, and the vision tower's rate beside the others'."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from nvila.components.contracts.errors import ConfigError
from nvila.components.contracts.manifest import MANIFEST
from nvila.components.contracts.places import is_address, is_version
from nvila.components.tracking.named import named
from nvila.pipelines.commands.overrides import asked_for

RATIO = "--vision-rate-ratio"


def start_from(model: str, runs: Path) -> str:
    """The model of `--from` as a recipe names it: an alias or number alone is one of your newest model.

    Raises:
        ConfigError: it names nothing.
        DamagedError, Unreachable: as of `tracking.named.named`.
    """
    if not model or is_address(model) or is_version(model):
        return model
    found = named(model, runs.absolute())
    if isinstance(found, Path):
        return str(found.parent if found.name == MANIFEST else found)
    return f"{found.name}{'/' if model.isdecimal() else '@'}{model}"


def with_ratio(recipe: str, overrides: Sequence[str], ratio: float | None, start: str) -> list[str]:
    """The overrides, and of each stage that trains the vision tower its rate: `ratio` times the stage's.

    Raises:
        ConfigError: no stage trains it, or the recipe is wrong.
    """
    if ratio is None:
        return list(overrides)
    _, checked = asked_for(recipe, overrides, start_from=start)
    named = zip(checked.pipeline.stages, checked.train.stages, strict=False)
    rates = {step: stage.learning_rate for step, stage in named if stage and "vision_tower" in stage.trainable}
    if not rates:
        raise ConfigError("no stage trains the vision tower", where=RATIO, value=ratio, do="Leave it out.")
    key = "learning_rates.vision_tower"
    return [*overrides, *(f"train.stages.{step}.{key}={rate * ratio!r}" for step, rate in rates.items())]
