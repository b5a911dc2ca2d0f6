"""Step `evaluate`: exact match on held-out splits after base and each stage, beside baselines without the picture."""

from __future__ import annotations

import random
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nvila.components.contracts.errors import DataError
from nvila.components.contracts.manifest import Manifest
from nvila.components.contracts.recipe.section import Section
from nvila.components.contracts.results.accuracy import Baseline, Evaluation, Scored
from nvila.components.contracts.results.result import Measured
from nvila.components.contracts.step import Outcome
from nvila.components.data.samples import Sample, read_samples
from nvila.components.metrics.accuracy import QuestionOnly, accuracy, is_correct

STAGES = ("base", "train-1", "train-2", "train-3", "train-4", "train-5")
"""Models measured, in the order of the DAG; the last is the final one."""


class Tasks(Section):
    """What is asked (the recipe's `evaluate` section without the gate)."""

    sources: list[str]
    limit: int | None
    stage_limit: int
    batch: int
    max_new_tokens: int


class Settings(Section):
    """Slice of `evaluate`."""

    evaluate: Tasks
    seed: int


def run(settings: Settings, inputs: Mapping[str, Manifest], out: Path) -> Outcome:
    """Measure the final model on all questions, and each earlier one on the first `stage_limit` of them.

    Args:
        settings: tasks and seed.
        inputs: `samples`, and the models by step name (`base`, `train-1` ... `train-5`).
        out: gets `predictions.parquet` (one row per question) and `stages.png`.

    Raises:
        DataError: a source has no held-out questions.
    """
    from nvila.components.metrics.answers import Questions, answers
    from nvila.components.model.checkpoint.native import load_native
    from nvila.components.model.device import default_device
    from nvila.components.model.feed import Feed

    began, device = time.monotonic(), default_device()
    tasks, table = settings.evaluate, inputs["samples"].path("samples.parquet")
    known = QuestionOnly(read_samples(table, split="sft", sources=tasks.sources))
    model, tokenizer = load_native(inputs[STAGES[-1]].dir("model"), dtype="bfloat16", device=device)
    feed = Feed(tokenizer, model.config)
    asked = {source: Questions.prepare(heldout(table, source, tasks, settings.seed), feed) for source in tasks.sources}
    how: dict[str, Any] = {"batch": tasks.batch, "max_new_tokens": tasks.max_new_tokens}
    scored: dict[str, Scored] = {}
    stages: dict[str, dict[str, Measured]] = {stage: {} for stage in STAGES}
    rows: list[dict[str, Any]] = []
    for source, questions in asked.items():
        said = {
            show: answers(model, tokenizer, questions.prompts(show), what=f"{source}, {show} picture", **how)
            for show in ("own", "blank", "other")
        }
        scored[source] = _beside_baselines(questions.samples, said, known)
        rows += [_row(*pair) for pair in zip(questions.samples, *said.values(), strict=True)]
    for stage in STAGES[:-1]:
        model, tokenizer = load_native(inputs[stage].dir("model"), dtype="bfloat16", device=device)
        for source, questions in asked.items():
            prompts = questions.prompts("own", tasks.stage_limit)
            predicted = answers(model, tokenizer, prompts, what=f"{stage}: {source}", **how)
            right = [is_correct(p, s.answer) for p, s in zip(predicted, questions.samples, strict=False)]
            stages[stage][source] = accuracy(right)
    for source in asked:
        right = [row["correct"] for row in rows if row["source"] == source]
        stages[STAGES[-1]][source] = accuracy(right[: tasks.stage_limit])
    _write(rows, out / "predictions.parquet")
    _plot(stages, out / "stages.png")
    seconds = time.monotonic() - began
    return Outcome(
        kind="metrics",
        result=Evaluation(accuracy=scored, stages=stages),
        files=("predictions.parquet", "stages.png"),
        measured={"seconds": seconds, "questions": len(rows)},
    )


def heldout(table: Path, source: str, tasks: Tasks, seed: int) -> list[Sample]:
    """The questions asked of a source, in an order that depends on the seed only."""
    samples = sorted(read_samples(table, split="heldout", sources=[source]), key=lambda sample: sample.id)
    if not samples:
        raise DataError(f"source {source} has no held-out questions", where=str(table))
    random.Random(seed).shuffle(samples)
    return samples[: tasks.limit]


def _beside_baselines(samples: list[Sample], said: Mapping[str, list[str]], known: QuestionOnly) -> Scored:
    def measure(given: list[str]) -> Measured:
        return accuracy([is_correct(g, s.answer) for g, s in zip(given, samples, strict=True)])

    baselines = {
        "question text": measure([known.answer(s) for s in samples]),
        "blank picture": measure(said["blank"]),
        "other picture": measure(said["other"]),
    }
    strongest = max(baselines, key=lambda kind: baselines[kind].value)
    return Scored(
        **measure(said["own"]).model_dump(),
        majority=measure([known.majority(s.source) for s in samples]),
        question_only=Baseline(kind=strongest, **baselines[strongest].model_dump()),
        baselines=baselines,
    )


def _row(sample: Sample, own: str, blank: str, other: str) -> dict[str, Any]:
    return {
        "id": sample.id,
        "source": sample.source,
        "question": sample.question,
        "answer": sample.answer,
        "prediction": own,
        "prediction_blank": blank,
        "prediction_other": other,
        "correct": is_correct(own, sample.answer),
        "root": str(sample.root),
        "media": list(sample.media),
    }


def _write(rows: list[dict[str, Any]], path: Path) -> None:
    import pyarrow
    import pyarrow.parquet as parquet

    parquet.write_table(pyarrow.Table.from_pylist(rows), path)


def _plot(stages: Mapping[str, Mapping[str, Measured]], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3), layout="constrained")
    axes = figure.subplots()
    for source in next(iter(stages.values())):
        axes.plot(list(stages), [stage[source].value for stage in stages.values()], marker="o", label=source)
    axes.set(ylabel="exact match", ylim=(0, 1))
    axes.legend()
    figure.savefig(path, dpi=100)
