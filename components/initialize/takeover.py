"""Takes a whole checkpoint over as the model that stage 1 starts from: copied file by file into the native layout."""

from __future__ import annotations

import shutil
from pathlib import Path

from nvila.components.contracts.results.model import Initialization
from nvila.components.model.checkpoint.convert import convert
from nvila.components.model.checkpoint.layouts import PARTS
from nvila.components.model.checkpoint.shards import count
from nvila.components.model.checkpoint.trainable import open_trainable
from nvila.components.tracking.trained import Trained


def take_over(place: str, start: Trained, folder: Path) -> Initialization:
    """Write `folder` in the native layout. No tensor is loaded whole; each value is read, and must be finite.

    Args:
        place: as the recipe names it.
        start: the checkpoint there.
        folder: gets `config.json`, `llm/`, `vision_tower/`, `mm_projector/`; what an interrupted attempt left goes.

    Raises:
        ConfigError, DataError: as `open_trainable`, or a value is not finite.
    """
    for left in (folder, folder.with_name(folder.name + ".partial")):
        shutil.rmtree(left, ignore_errors=True)
    checkpoint = open_trainable(start.folder)
    convert(checkpoint.folder, folder, "native")
    return Initialization(
        parameters={part: count(folder / part) for part in PARTS},
        weights={"model": start.version},
        start=place,
    )
