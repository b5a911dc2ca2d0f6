"""Step `ablate-ratio-case`: fine-tunes one model by one row of the table at one ratio, and asks the questions."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nvila.components.contracts.files import write_atomic
from nvila.components.contracts.manifest import Manifest
from nvila.components.contracts.meter import METER, read_meter
from nvila.components.contracts.recipe.evaluate import Tasks
from nvila.components.contracts.recipe.section import Section
from nvila.components.contracts.recipe.train import Run, Stage
from nvila.components.contracts.step import Outcome
from nvila.components.data.samples import SAMPLES_FILE
from nvila.pipelines.ablate.attempt import (
    ANSWERS_FILE,
    CASE_FILE,
    COST_FILE,
    Clock,
    answered,
    prepared,
    trained,
    write,
)

TUNED = "tuned"
"""Folder of the trained stage."""


class Settings(Section):
    """What one case is."""

    stage: Stage
    """As the row trains it, at its ratio."""
    run: Run
    tasks: Tasks
    seed: int
    """Of the adapters' first weights and of the order of training."""
    question_seed: int
    """Of the choice of held-out questions: the recipe's, the same for all cases."""


def run(settings: Settings, inputs: Mapping[str, Manifest], out: Path) -> Outcome:
    """Tune and ask; an interrupted case goes on where it was.

    Args:
        settings: the row's stage, the seed.
        inputs: `model`, which is tuned, and `samples`.
        out: gets `case.json` and `answers.parquet`; what was trained goes when it has answered.
    """
    clock = Clock(out / COST_FILE)
    others, stages = {"samples": inputs["samples"]}, {TUNED: settings.stage}
    ((_, model, came),) = trained(stages, settings.run, settings.seed, inputs["model"], others, out)
    clock.write()
    read = read_meter(out / TUNED / METER)
    seconds, steps = sum(one.seconds for _, one in read), came["steps"] - read[0][1].step
    # What was read first has the first steps in it, in which memory is taken and caches fill.
    later = seconds - read[0][1].seconds
    told: dict[str, Any] = came | {"steps_per_second": round(steps / later, 3) if steps and later else None}
    table, tasks = inputs["samples"].path(SAMPLES_FILE), settings.tasks
    folder = inputs["model"].dir("model")
    asked = {source: prepared(table, source, folder, tasks, settings.question_seed) for source in tasks.sources}
    write(answered(TUNED, model.dir("model"), asked, tasks), out / ANSWERS_FILE)
    clock.write()
    write_atomic(out / CASE_FILE, json.dumps(told, indent=1))
    shutil.rmtree(out / TUNED)
    return Outcome(kind="metrics", files=(CASE_FILE, ANSWERS_FILE))


def warm(given: Mapping[str, Any], inputs: Mapping[str, Manifest]) -> None:
    """Nothing: what a case prepares takes seconds."""
