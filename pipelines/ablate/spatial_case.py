"""Step `ablate-spatial-case`: makes and trains a model of one row of the table, and asks the held-out questions."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nvila.components.contracts.environment import Environment
from nvila.components.contracts.files import write_atomic
from nvila.components.contracts.manifest import Manifest
from nvila.components.contracts.recipe.evaluate import Tasks
from nvila.components.contracts.recipe.model import ModelSettings
from nvila.components.contracts.recipe.section import Section
from nvila.components.contracts.recipe.train import Run, Stage
from nvila.components.contracts.sealed import fault, seal
from nvila.components.contracts.step import Outcome
from nvila.components.contracts.steps import INITIALIZE
from nvila.components.data.samples import SAMPLES_FILE, read_samples
from nvila.components.initialize import step as initialize
from nvila.pipelines.ablate.attempt import (
    ANSWERS_FILE,
    CASE_FILE,
    COST_FILE,
    Clock,
    answered,
    manifest,
    prepared,
    trained,
    write,
)

if TYPE_CHECKING:
    from nvila.components.metrics.answers import Questions

MADE = "made.json"
"""Record of the model before stage 1, without which it is made anew."""
MODEL = ("model/**/*",)


class Settings(Section):
    """What one case is."""

    model: ModelSettings
    """As the row has it."""
    stages: dict[str, Stage]
    """As the row trains them, by step and in their order."""
    run: Run
    tasks: Tasks
    seed: int
    """Of the first weights and of the order of training."""
    question_seed: int
    """Of the choice of held-out questions: the recipe's, the same for all cases."""


def run(settings: Settings, inputs: Mapping[str, Manifest], out: Path, here: Environment) -> Outcome:
    """Make, train and ask; an interrupted case goes on where it was.

    Args:
        settings: the row, the recipe's stages, the seed.
        inputs: `samples`.
        out: gets `case.json` and `answers.parquet`, whose rows tell besides what the question's text alone is worth;
            what was trained goes when it has answered.
        here: of the process, for the first step.
    """
    clock = Clock(out / COST_FILE)
    first = out / INITIALIZE
    if fault(first, first / MADE, MODEL) is not None:
        shutil.rmtree(first, ignore_errors=True)
        first.mkdir(parents=True)
        row = initialize.Settings(
            model=settings.model, seed=settings.seed, max_skipped_share=settings.run.max_skipped_share
        )
        initialize.run(row, inputs, first, here)
        seal(first, first / MADE, MODEL)
        clock.write()
    told: dict[str, Any] = {"stages": {}}
    last = manifest(INITIALIZE, first, MODEL)
    asked = _questions(settings, inputs["samples"].path(SAMPLES_FILE), last.dir("model"))
    told["shown"] = {source: _shown(questions, last.dir("model")) for source, questions in asked.items()}
    for name, made, came in trained(settings.stages, settings.run, settings.seed, last, inputs, out):
        told["stages"][name], last = came, made
        clock.write()
    rows = answered(last.step, last.dir("model"), asked, settings.tasks)
    write(_beside_text(rows, asked, settings, inputs["samples"].path(SAMPLES_FILE)), out / ANSWERS_FILE)
    clock.write()
    write_atomic(out / CASE_FILE, json.dumps(told, indent=1))
    for name in (INITIALIZE, *settings.stages):
        shutil.rmtree(out / name)
    return Outcome(kind="metrics", files=(CASE_FILE, ANSWERS_FILE))


def warm(given: Mapping[str, Any], inputs: Mapping[str, Manifest]) -> None:
    """Nothing: each row sees the pictures in its own way."""


def _questions(settings: Settings, table: Path, model: Path) -> dict[str, Questions]:
    tasks = settings.tasks
    return {source: prepared(table, source, model, tasks, settings.question_seed) for source in tasks.sources}


def _shown(questions: Questions, model: Path) -> dict[str, float]:
    """Tiles and tokens of a picture, on average."""
    from nvila.components.model.checkpoint.native import read_config
    from nvila.components.model.vision.visual import token_count

    config = read_config(model)
    every = [visual for prompt in questions.shown.values() for visual in prompt.visuals]
    tokens = [token_count(one.kind, one.block_size, len(one.tiles), config, (0, 0, 0)) for one in every]
    return {"tiles": sum(len(one.tiles) for one in every) / len(every), "tokens": sum(tokens) / len(every)}


def _beside_text(
    rows: list[dict[str, Any]], asked: Mapping[str, Questions], settings: Settings, table: Path
) -> list[dict[str, Any]]:
    """The rows with what the commonest answer to the same question text is worth."""
    from nvila.components.metrics.accuracy import QuestionOnly, scores

    tasks = settings.tasks
    known = QuestionOnly(read_samples(table, split="sft", sources=tasks.sources))
    worth: dict[str, float] = {}
    for source, questions in asked.items():
        told = scores(tasks.metric(source), map(known.answer, questions.samples), [s.answer for s in questions.samples])
        worth |= {sample.id: float(value) for sample, value in zip(questions.samples, told, strict=True)}
    return [row | {"text_alone": worth[row["id"]]} for row in rows]
