"""What every case of an experiment does: count what it costs, hand its own files to a step, write its answers."""

from __future__ import annotations

import json
import resource
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nvila.components.contracts.files import read_json, write_atomic
from nvila.components.contracts.manifest import Manifest, describe_files
from nvila.components.contracts.recipe.evaluate import Tasks
from nvila.components.contracts.recipe.train import Run, Stage
from nvila.components.train import step as training
from nvila.components.train.losses import LOSSES, read_losses

if TYPE_CHECKING:
    from nvila.components.metrics.answers import Questions

ANSWERS_FILE = "answers.parquet"
"""A row per stage and held-out question."""
CASE_FILE = "case.json"
"""Of each stage: optimizer steps, passes over its data, final loss; and what else the case tells."""
COST_FILE = "cost.json"
"""Seconds and CPU seconds, of all attempts; facts of the execution, which the manifest does not name."""


def trained(
    stages: Mapping[str, Stage], run: Run, seed: int, model: Manifest, others: Mapping[str, Manifest], out: Path
) -> Iterator[tuple[str, Manifest, dict[str, Any]]]:
    """Train stage after stage in folders of `out`, each resumed where it was; after each its step, model and what it
    came to.

    Args:
        stages: the rows by their step, in their order.
        run: how they are run.
        seed: of the order of samples.
        model: before the first.
        others: what every stage reads besides, as `samples`.
        out: of the case.
    """
    for name, stage in stages.items():
        place = out / name
        place.mkdir(exist_ok=True)
        row = training.Settings(stage=stage, run=run, seed=seed)
        training.run(row, {"model": model, **others}, place)
        model = manifest(name, place, ("model/**/*",))
        losses = read_losses(place / LOSSES)
        yield name, model, {"steps": losses[-1]["step"], "data": stage.data, "loss": losses[-1]["loss"]}


def manifest(step: str, folder: Path, patterns: tuple[str, ...]) -> Manifest:
    """What a step reads, of a folder of the case."""
    return Manifest(
        step=step, key="case", kind="dataset", files=describe_files(folder, patterns), folder=str(folder.absolute())
    )


def prepared(table: Path, source: str, model: Path, tasks: Tasks, seed: int) -> Questions:
    """Held-out questions of a source, their media as the model of this folder, and all that come of it, see them."""
    from nvila.components.evaluate.step import heldout
    from nvila.components.metrics.answers import Questions
    from nvila.components.model.checkpoint.native import read_config
    from nvila.components.model.feed import Feed
    from nvila.components.model.text.tokenizer import load_tokenizer

    feed = Feed(load_tokenizer(model / "llm", model), read_config(model))
    return Questions.prepare(heldout(table, source, tasks, seed), feed)


def answered(stage: str, folder: Path, asked: Mapping[str, Questions], tasks: Tasks) -> list[dict[str, Any]]:
    """A row of the answer table for each question: what the model of `folder` says, and what that is worth.

    Args:
        stage: after which the model is asked.
        folder: native checkpoint.
        asked: the questions by source.
        tasks: batch, longest answer and metrics.
    """
    import torch

    from nvila.components.metrics.accuracy import scores
    from nvila.components.metrics.answers import answers
    from nvila.components.model.checkpoint.native import load_native
    from nvila.components.model.device import default_device
    from nvila.pipelines.ablate.kinds import kind_of

    torch.set_num_threads(1)  # several cases share the machine
    loaded, tokenizer = load_native(folder, dtype="bfloat16", device=default_device())
    rows = []
    for source, questions in asked.items():
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


def write(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """The answer table."""
    import pyarrow
    import pyarrow.parquet as parquet

    parquet.write_table(pyarrow.Table.from_pylist(list(rows)), path)


class Clock:
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
