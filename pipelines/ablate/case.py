"""Step `ablate-case`: trains the pruned stages on what one method keeps, and asks the held-out questions."""

from __future__ import annotations

import json
import math
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from nvila.components.contracts.files import write_atomic
from nvila.components.contracts.manifest import Manifest
from nvila.components.contracts.recipe.evaluate import Tasks
from nvila.components.contracts.recipe.section import Section
from nvila.components.contracts.recipe.train import Run, Stage
from nvila.components.contracts.step import Outcome
from nvila.components.contracts.steps import PRUNE_IMAGE
from nvila.components.data.samples import SAMPLES_FILE
from nvila.pipelines.ablate import passes, subset
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
from nvila.pipelines.ablate.cases import Schedule
from nvila.pipelines.ablate.spoil import SPOILT_FILE

if TYPE_CHECKING:
    from nvila.components.metrics.answers import Questions

SPOILT_STEP = "ablate-spoil"


class Settings(Section):
    """What one case is."""

    method: str
    ratio: float
    reference: float
    """The ratio whose passes say how many the equal steps are."""
    schedule: Schedule
    score: Literal["sum", "mean"]
    """Losses summed or averaged over answer tokens."""
    stages: dict[str, Stage]
    """The rows of the stage table by their step, in their order."""
    run: Run
    tasks: Tasks
    seed: int
    """Of the training order and of random choices."""
    question_seed: int
    """Of the choice of held-out questions: the recipe's, the same for all cases."""


def run(settings: Settings, inputs: Mapping[str, Manifest], out: Path) -> Outcome:
    """Train and evaluate; an interrupted case goes on where it was.

    Args:
        settings: method, ratio, schedule, seed, and the recipe's rows.
        inputs: `model` (before the first of the stages), `samples` (of `validate` or `ablate-spoil`), `scores_*` (of
            `prune`).
        out: gets the files named above; what was trained goes when it has answered.
    """
    clock = Clock(out / COST_FILE)
    tables = _kept(settings, inputs, out)
    ids = json.loads(inputs["samples"].path(SPOILT_FILE).read_text()) if _is_spoilt(inputs["samples"]) else []
    told: dict[str, Any] = {"stages": {}, "spoilt": _dropped(tables, ids)}
    rows = list[dict[str, Any]]()
    written = {f"kept_{name}": manifest(PRUNE_IMAGE, out / f"kept_{name}", ("scores.parquet",)) for name in tables}
    stages, others = _rows(settings, inputs, tables), {"samples": inputs["samples"], **written}
    for name, made, came in trained(stages, settings.run, settings.seed, inputs["model"], others, out):
        told["stages"][name] = came
        clock.write()
        rows += _answers(settings, name, made, inputs)
        clock.write()
    told["kept"] = {name: sum(columns["kept"]) for name, columns in tables.items()}
    write_atomic(out / CASE_FILE, json.dumps(told, indent=1))
    write(rows, out / ANSWERS_FILE)
    for name in settings.stages:
        shutil.rmtree(out / name)
    return Outcome(kind="metrics", files=(CASE_FILE, ANSWERS_FILE))


def rows_of(
    stages: Mapping[str, Stage], schedule: Schedule, sizes: passes.Sizes, kept: passes.Sizes, reference: passes.Sizes
) -> dict[str, Stage]:
    """The stages with the passes of a case.

    Args:
        stages: the recipe's rows.
        schedule: for how long.
        sizes: samples of each subset, all of them.
        kept: those that stay.
        reference: those that stay at the reference ratio.
    """
    found = {}
    for name, stage in stages.items():
        if schedule == "epoch":
            found[name] = passes.one_epoch(stage, sizes, kept)
        else:
            steps = passes.steps_of(passes.one_epoch(stage, sizes, reference), reference)
            found[name] = passes.equal_steps(stage, sizes, kept, steps)
    return found


def at_ratio(sizes: passes.Sizes, ratio: float) -> dict[str, int]:
    """What stays of subsets of these sizes."""
    return {name: math.ceil(ratio * n) if name.endswith(".sft") else n for name, n in sizes.items()}


def _rows(settings: Settings, inputs: Mapping[str, Manifest], tables: Mapping[str, Any]) -> dict[str, Stage]:
    import pyarrow.parquet as parquet

    table = parquet.read_table(inputs["samples"].path(SAMPLES_FILE), columns=["source", "split"]).to_pydict()
    sizes = Counter(f"{source}.{split}" for source, split in zip(table["source"], table["split"], strict=True))
    kept = dict(sizes)
    for columns in tables.values():
        pairs = list(zip(columns["source"], columns["kept"], strict=True))
        kept |= {f"{source}.sft": sum(stays for of, stays in pairs if of == source) for source, _ in pairs}
    return rows_of(settings.stages, settings.schedule, sizes, kept, at_ratio(sizes, settings.reference))


def _kept(settings: Settings, inputs: Mapping[str, Manifest], out: Path) -> dict[str, Any]:
    """Choose, and write what the stages read."""
    found = {}
    for name in (n.removeprefix("scores_") for n in inputs if n.startswith("scores_")):
        scores = inputs[f"scores_{name}"]
        found[name] = subset.kept_by(scores, settings.method, settings.ratio, settings.score, settings.seed)
        subset.write(found[name], out / f"kept_{name}" / subset.SCORES_FILE)
    return found


def _is_spoilt(samples: Manifest) -> bool:
    return samples.step == SPOILT_STEP


def _dropped(tables: Mapping[str, Any], ids: Sequence[str]) -> dict[str, tuple[int, int]]:
    found: dict[str, tuple[int, int]] = {}
    for columns in tables.values():
        found |= subset.share_dropped(columns, ids)
    return found


def warm(given: Mapping[str, Any], inputs: Mapping[str, Manifest]) -> None:
    """Prepare the questions once for all cases of an experiment, whose processes are forks of this one."""
    settings = Settings.model_validate(given)
    for source in settings.tasks.sources:
        _questions(inputs["samples"].path(SAMPLES_FILE), source, inputs["model"].dir("model"), *_asked(settings))


def _asked(settings: Settings) -> tuple[str, int]:
    return settings.tasks.model_dump_json(), settings.question_seed


@cache
def _questions(table: Path, source: str, model: Path, tasks: str, seed: int) -> Questions:
    return prepared(table, source, model, Tasks.model_validate_json(tasks), seed)


def _answers(settings: Settings, stage: str, model: Manifest, inputs: Mapping[str, Manifest]) -> list[dict[str, Any]]:
    """What the model says to the held-out questions of the sources that its stages have seen."""
    table, before = inputs["samples"].path(SAMPLES_FILE), inputs["model"].dir("model")
    seen = {name.partition(".")[0] for name in settings.stages[stage].data}
    sources = (source for source in settings.tasks.sources if source in seen)
    asked = {source: _questions(table, source, before, *_asked(settings)) for source in sources}
    return answered(stage, model.dir("model"), asked, settings.tasks)
