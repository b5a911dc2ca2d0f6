"""Step `register`: the quantized model becomes a version in the registry. No alias names it: that is rollout's.

It reconciles: whoever runs it again finds the same version, with its card, tags and pinned prompts put right.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

from nvila.components.contracts.environment import Environment
from nvila.components.contracts.manifest import Manifest
from nvila.components.contracts.recipe.rollout import RegisterSettings
from nvila.components.contracts.recipe.section import Section
from nvila.components.contracts.results.model import Quantization
from nvila.components.contracts.results.run import Registration
from nvila.components.contracts.step import Outcome
from nvila.components.contracts.steps import REGISTER
from nvila.components.register.card import model_card, whole_card
from nvila.components.register.package import log_model
from nvila.components.register.pinned import write_pinned
from nvila.components.register.record import record_metrics
from nvila.components.runner.execute import Place
from nvila.components.tracking.connect import NEEDED_SECONDS, wait_for
from nvila.components.tracking.registry import keep_pinned, lineage_tags, register_version
from nvila.components.tracking.runs import open_step

if TYPE_CHECKING:
    from mlflow import MlflowClient

CARD = "model_card.md"


class Settings(Section):
    """Slice of `register`."""

    register_: RegisterSettings = Field(alias="register")


def run(settings: Settings, inputs: Mapping[str, Manifest], out: Path, here: Environment) -> Outcome:
    """Create or update the version.

    Args:
        settings: the name in the registry.
        inputs: `model` (of quantize), `metrics` (of evaluate-quantized), `full` (of evaluate), `samples`, `gate`.
        out: gets the model card.
        here: whose folder of runs has the tracking store.

    Raises:
        Unreachable, ConfigError, NvilaError: of MLflow; the model stays in the store, and the same command goes on.
    """
    run_dir, name = Place.of(here).run_dir, settings.register_.model_name
    runs = run_dir.parent
    wait_for(runs, NEEDED_SECONDS)
    model = inputs["model"]
    model.dir("model", fresh=True)  # also where the version is there already: rollout serves this folder
    (out / CARD).write_text(whole_card(name, inputs), encoding="utf-8")
    lineage = lineage_tags(inputs)

    def log(client: MlflowClient) -> dict[str, Any]:
        opened = open_step(client, run_dir, REGISTER)
        logged = log_model(
            client,
            model,
            out / "upload",
            run=opened,
            name=name,
            params={key: str(value) for key, value in model.told(Quantization).linears.items()},
            tags=lineage,
        )
        record_metrics(client, opened.info.run_id, logged["model_id"], inputs)
        return logged

    card = model_card(name, inputs)
    version = register_version(runs, name, model.digest, log, description=card, tags=lineage)
    keep_pinned(runs, version, write_pinned(out / "upload", name, inputs))
    shutil.rmtree(out / "upload")
    return Outcome(
        kind="version", result=Registration(name=name, version=version.version, model_uri=version.uri), files=(CARD,)
    )
