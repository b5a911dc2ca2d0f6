"""Step `ablate-case`: trains the pruned stages on what one method keeps, and asks the held-out questions."""

from __future__ import annotations

import json
import math
import resource
import shutil
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from nvila.components.contracts.files import read_json, write_atomic
from nvila.components.contracts.manifest import Manifest, describe_files
from nvila.components.contracts.recipe.evaluate import Tasks
from nvila.components.contracts.recipe.section import Section
from nvila.components.contracts.recipe.train import Run, Stage
from nvila.components.contracts.step import Outcome
from nvila.components.contracts.steps import PRUNE_IMAGE
from nvila.components.data.samples import SAMPLES_FILE
from nvila.components.train import step as training
from nvila.components.train.losses import LOSSES, read_losses
from nvila.pipelines.ablate import passes, subset
from nvila.pipelines.ablate.cases import Schedule
from nvila.pipelines.ablate.spoil import SPOILT_FILE

if TYPE_CHECKING:
    from nvila.components.metrics.answers import Questions

CASE_FILE = "case.json"
"""Of each stage: samples that stay, optimizer steps, final loss. Of each spoilt source: how many stay."""
ANSWERS_FILE = "answers.parquet"
"""A row per stage and held-out question."""
COST_FILE = "cost.json"
"""Seconds and CPU seconds, of all attempts; facts of the execution, which the manifest does not name."""
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
    clock = _Clock(out / COST_FILE)
    tables = _kept(settings, inputs, out)
    ids = json.loads(inputs["samples"].path(SPOILT_FILE).read_text()) if _is_spoilt(inputs["samples"]) else []
    told: dict[str, Any] = {"stages": {}, "spoilt": _dropped(tables, ids)}
    model, rows = inputs["model"], list[dict[str, Any]]()
    written = {f"kept_{name}": _manifest(PRUNE_IMAGE, out / f"kept_{name}", ("scores.parquet",)) for name in tables}
    for name, stage in _rows(settings, inputs, tables).items():
        place = out / name
        place.mkdir(exist_ok=True)
        row = training.Settings(stage=stage, run=settings.run, seed=settings.seed)
        training.run(row, {"model": model, "samples": inputs["samples"], **written}, place)
        model = _manifest(name, place, ("model/**/*",))
        losses = read_losses(place / LOSSES)
        told["stages"][name] = {"steps": losses[-1]["step"], "data": stage.data, "loss": losses[-1]["loss"]}
        clock.write()
        rows += _answers(settings, name, model, inputs)
        clock.write()
    told["kept"] = {name: sum(columns["kept"]) for name, columns in tables.items()}
    write_atomic(out / CASE_FILE, json.dumps(told, indent=1))
    _write(rows, out / ANSWERS_FILE)
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


def warm(settings: Settings, inputs: Mapping[str, Manifest]) -> None:
    """Prepare the questions once for all cases of an experiment, whose processes are forks of this one."""
    for source in settings.tasks.sources:
        _questions(inputs["samples"].path(SAMPLES_FILE), source, inputs["model"].dir("model"), *_asked(settings))


def _asked(settings: Settings) -> tuple[str, int]:
    return settings.tasks.model_dump_json(), settings.question_seed


@cache
def _questions(table: Path, source: str, model: Path, tasks: str, seed: int) -> Questions:
    """Held-out questions of a source, their media as the model of this folder, and all that come of it, see them."""
    from nvila.components.evaluate.step import heldout
    from nvila.components.metrics.answers import Questions
    from nvila.components.model.checkpoint.native import read_config
    from nvila.components.model.feed import Feed
    from nvila.components.model.text.tokenizer import load_tokenizer

    feed = Feed(load_tokenizer(model / "llm", model), read_config(model))
    return Questions.prepare(heldout(table, source, Tasks.model_validate_json(tasks), seed), feed)


def _answers(settings: Settings, stage: str, model: Manifest, inputs: Mapping[str, Manifest]) -> list[dict[str, Any]]:
    """What the model says to the held-out questions of the sources that its stages have seen."""
    import torch

    from nvila.components.metrics.accuracy import scores
    from nvila.components.metrics.answers import answers
    from nvila.components.model.checkpoint.native import load_native
    from nvila.components.model.device import default_device
    from nvila.pipelines.ablate.kinds import kind_of

    torch.set_num_threads(1)  # several cases share the machine
    table, before = inputs["samples"].path(SAMPLES_FILE), inputs["model"].dir("model")
    tasks, rows = settings.tasks, []
    seen = {name.partition(".")[0] for name in settings.stages[stage].data}
    loaded, tokenizer = load_native(model.dir("model"), dtype="bfloat16", device=default_device())
    for source in (source for source in tasks.sources if source in seen):
        questions = _questions(table, source, before, *_asked(settings))
        said = answers(
            loaded,
            tokenizer,
            questions.prompts("own"),
            batch=tasks.batch,
            max_new_tokens=tasks.max_new_tokens,
            what=f"{stage}: {source}",
        )
        worth = scores(tasks.metric(source), said, [sample.answer for sample in questions.samples])
        for sample, prediction, value in zip(questions.samples, said, worth, strict=True):
            row = {"stage": stage, "id": sample.id, "source": source, "kind": kind_of(sample)}
            rows.append(row | {"answer": sample.answer, "prediction": prediction, "worth": float(value)})
    return rows


def _manifest(step: str, folder: Path, patterns: tuple[str, ...]) -> Manifest:
    """What a stage reads, of a folder of this case."""
    return Manifest(
        step=step, key="case", kind="dataset", files=describe_files(folder, patterns), folder=str(folder.absolute())
    )


def _write(rows: list[dict[str, Any]], path: Path) -> None:
    import pyarrow
    import pyarrow.parquet as parquet

    parquet.write_table(pyarrow.Table.from_pylist(rows), path)


class _Clock:
    """Adds up what all attempts at a case have cost, as far as they have told."""

    def __init__(self, path: Path) -> None:
        self._path, self._before = path, read_json(path)
        self._began, self._cpu = time.monotonic(), _cpu_seconds()

    def write(self) -> None:
        """Write down what was spent until now."""
        spent = {"seconds": time.monotonic() - self._began, "cpu_seconds": _cpu_seconds() - self._cpu}
        told = {name: round(self._before.get(name, 0.0) + value, 2) for name, value in spent.items()}
        write_atomic(self._path, json.dumps(told))


def _cpu_seconds() -> float:
    """Of this process and of all that it has started and seen end."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)
