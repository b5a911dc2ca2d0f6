"""Step `initialize`: an untrained VLM of published weights, a small one made here, or a whole one that is taken."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nvila.components.contracts.environment import Environment
from nvila.components.contracts.manifest import Manifest
from nvila.components.contracts.recipe.model import ModelSettings
from nvila.components.contracts.recipe.section import Section
from nvila.components.contracts.step import Outcome
from nvila.components.data.fetch import identity
from nvila.components.tracking import trained


class Settings(Section):
    """Slice of `initialize`."""

    model: ModelSettings
    seed: int
    max_skipped_share: float
    """Of the label pictures."""


def external(settings: Mapping[str, Any], here: Environment) -> dict[str, Any]:
    """What the named weights are now: digests in a local folder, versions in a bucket, the commit on the hub; of a
    version of the registry its number and the digest of the model that it was quantized from."""
    base = settings["model"]["base"]
    if place := base.get("model"):
        return {"model": trained.identity(place, here.run_folder.parent)}
    return {part: identity(base[part]) for part in ("vision_tower", "llm")}


def run(settings: Settings, inputs: Mapping[str, Manifest], out: Path, here: Environment) -> Outcome:
    """Make the model that stage 1 starts from.

    Args:
        settings: architecture and where the first weights come from.
        inputs: `samples` (the validated tables; texts for the tokenizer, labels for the tower).
        out: gets `model/` in the native layout.
        here: tells where the registry is.

    Raises:
        ConfigError: weights that do not fit the architecture, or a whole model that cannot be trained.
        DataError: nothing that a tower made from scratch could learn from, too many of its pictures cannot be read, or
            there are no such weights.
        Unreachable: the weights cannot be fetched now.
    """
    base = settings.model.base
    began = time.monotonic()
    start = None
    if base.model:
        from nvila.components.initialize.takeover import take_over

        found = trained.find(base.model, here.run_folder.parent)
        result, start = take_over(base.model, found, out / "model"), found.ref
    elif base.vision_tower and base.llm:
        from nvila.components.initialize.assemble import assemble

        result = assemble(settings.model, settings.seed, out / "model")
    else:
        from nvila.components.initialize.scratch import make

        result = make(settings.model, settings.seed, inputs["samples"], out / "model", settings.max_skipped_share)
    return Outcome(
        kind="model",
        result=result,
        files=("model/**/*",),
        read=result.weights,
        start=start,
        measured={"seconds": round(time.monotonic() - began, 1)},
    )
