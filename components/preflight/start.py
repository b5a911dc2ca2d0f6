"""Whether the whole model that training starts from is one that can be trained, and changed as the stages say."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from nvila.components.contracts.errors import NvilaError, Unreachable
from nvila.components.contracts.places import is_address
from nvila.components.contracts.recipe.train import Stage
from nvila.components.model.checkpoint.changes import changed
from nvila.components.model.checkpoint.trainable import open_trainable, read_trainable
from nvila.components.tracking.trained import folder_of


def problems(place: str, stages: Iterable[Stage], runs: Path) -> list[str]:
    """What is wrong with it, in words. Of `s3://` and `hf://` the files that describe it are fetched, no weights.

    Args:
        place: as the recipe names it.
        stages: those that are trained, in order.
        runs: folder of all runs, with the local registry.

    Raises:
        Unreachable: the place does not answer.
    """
    try:
        folder = folder_of(place, runs)
        checkpoint = read_trainable(folder) if is_address(place) else open_trainable(folder)
        for stage in stages:
            checkpoint = changed(checkpoint, stage.model)
    except Unreachable:
        raise
    except NvilaError as error:
        return [f"model.base.model: {error}"]
    return []
