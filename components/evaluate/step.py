"""Step `evaluate`: scores on held-out splits before training and after each stage, beside blind baselines."""

from __future__ import annotations

import random
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nvila.components.contracts.errors import DataError
from nvila.components.contracts.manifest import Manifest
from nvila.components.contracts.metrics import Metric, in_words
from nvila.components.contracts.recipe.evaluate import Tasks
from nvila.components.contracts.recipe.section import Section
from nvila.components.contracts.results.accuracy import Base, Baseline, Evaluation, Scored
from nvila.components.contracts.results.model import Initialization
from nvila.components.contracts.results.result import Measured
from nvila.components.contracts.step import Outcome
from nvila.components.data.samples import Sample, read_samples
from nvila.components.metrics.accuracy import QuestionOnly, fall_interval, is_correct, measured, scores

if TYPE_CHECKING:
    from nvila.components.model.config.config import ModelConfig


class Settings(Section):
    """Slice of `evaluate`."""

    evaluate: Tasks
    seed: int


def run(settings: Settings, inputs: Mapping[str, Manifest], out: Path) -> Outcome:
    """Measure the final model on all questions, and each earlier one on the first `stage_limit` of them; on all a whole
    model that training started from, which the final one is held against.

    Args:
        settings: tasks and seed.
        inputs: `samples`, and `model` of the last stage, whose manifest leads to the models that it came from.
        out: gets `predictions.parquet` (one row per question) and `stages.png`.

    Raises:
        DataError: a source has no held-out questions.
        DamagedError: an earlier model is not the one that the last came from.
    """
    from nvila.components.metrics.answers import Questions, answers
    from nvila.components.model.checkpoint.native import load_native
    from nvila.components.model.device import default_device
    from nvila.components.model.feed import Feed

    began, device = time.monotonic(), default_device()
    *earlier, last = _ancestry(inputs["model"])
    tasks, table = settings.evaluate, inputs["samples"].path("samples.parquet")
    known = QuestionOnly(read_samples(table, split="sft", sources=tasks.sources))
    model, tokenizer = load_native(last.dir("model"), dtype="bfloat16", device=device)
    feed = Feed(tokenizer, model.config)
    asked = {source: Questions.prepare(heldout(table, source, tasks, settings.seed), feed) for source in tasks.sources}
    how: dict[str, Any] = {"batch": tasks.batch, "max_new_tokens": tasks.max_new_tokens}
    scored: dict[str, Scored] = {}
    worth: dict[str, list[float]] = {}
    stages: dict[str, dict[str, Measured]] = {made.step: {} for made in (*earlier, last)}
    rows: list[dict[str, Any]] = []
    for source, questions in asked.items():
        said = {
            show: answers(model, tokenizer, questions.prompts(show), what=f"{source}, {show} picture", **how)
            for show in ("own", "blank", "other")
        }
        worth[source] = scores(tasks.metric(source), said["own"], [s.answer for s in questions.samples])
        scored[source] = _beside_baselines(tasks.metric(source), questions.samples, said, known)
        stages[last.step][source] = _measure(tasks.metric(source), said["own"][: tasks.stage_limit], questions.samples)
        rows += [_row(*pair) for pair in zip(questions.samples, *said.values(), strict=True)]
    shown = {_seen(feed.config): asked}
    for made in earlier:
        limit = None if _is_base(made) else tasks.stage_limit
        model, tokenizer = load_native(made.dir("model"), dtype="bfloat16", device=device)
        if (seen := _seen(model.config)) not in shown:
            feed = Feed(tokenizer, model.config)
            some = {source: questions.samples[:limit] for source, questions in asked.items()}
            shown[seen] = {source: Questions.prepare(samples, feed) for source, samples in some.items()}
        for source, questions in shown[seen].items():
            prompts, metric = questions.prompts("own", limit), tasks.metric(source)
            predicted = answers(model, tokenizer, prompts, what=f"{made.step}: {source}", **how)
            stages[made.step][source] = _measure(metric, predicted[: tasks.stage_limit], questions.samples)
            if _is_base(made):
                base = _since(metric, predicted, worth[source], questions.samples)
                scored[source] = scored[source].model_copy(update={"base": base})
    _write(rows, out / "predictions.parquet")
    _plot(stages, out / "stages.png")
    seconds = time.monotonic() - began
    return Outcome(
        kind="metrics",
        result=Evaluation(accuracy=scored, stages=stages),
        files=("predictions.parquet", "stages.png"),
        measured={"seconds": seconds, "questions": len(rows)},
    )


def _ancestry(model: Manifest) -> list[Manifest]:
    """The models that this one came from, the untrained one first, and itself."""
    return [*(_ancestry(model.origin("model")) if "model" in model.inputs else ()), model]


def _is_base(made: Manifest) -> bool:
    """Whether it is a whole model that training started from."""
    return isinstance(made.result, Initialization) and made.result.start is not None


def _since(metric: Metric, said: list[str], after: list[float], samples: list[Sample]) -> Base:
    """The base by its answers, and what became of it: `after` is what the final model's are worth."""
    before = scores(metric, said, [s.answer for s in samples])
    fell = [round(value, 4) for value in fall_interval(before, after)]
    return Base(**measured(metric, before).model_dump(), fall=fell[0], fall_low=fell[1], fall_high=fell[2])


def _seen(config: ModelConfig) -> tuple[Any, ...]:
    """What a stage may change of how questions are put."""
    return config.sampling, config.time_tokens


def heldout(table: Path, source: str, tasks: Tasks, seed: int) -> list[Sample]:
    """The questions asked of a source, in an order that depends on the seed only."""
    samples = sorted(read_samples(table, split="heldout", sources=[source]), key=lambda sample: sample.id)
    if not samples:
        raise DataError(f"source {source} has no held-out questions", where=str(table))
    random.Random(seed).shuffle(samples)
    return samples[: tasks.limit]


def _measure(metric: Metric, said: list[str], samples: list[Sample]) -> Measured:
    """Of the first samples, as many as have been answered."""
    return measured(metric, scores(metric, said, [s.answer for s in samples[: len(said)]]))


def _beside_baselines(
    metric: Metric, samples: list[Sample], said: Mapping[str, list[str]], known: QuestionOnly
) -> Scored:
    baselines = {
        "question text": _measure(metric, [known.answer(s) for s in samples], samples),
        "blank picture": _measure(metric, said["blank"], samples),
        "other picture": _measure(metric, said["other"], samples),
    }
    strongest = max(baselines, key=lambda kind: baselines[kind].value)
    return Scored(
        **_measure(metric, said["own"], samples).model_dump(),
        majority=_measure(metric, [known.majority(s.source) for s in samples], samples),
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
    axes.set(ylabel=in_words(m.metric for stage in stages.values() for m in stage.values()), ylim=(0, 1))
    axes.legend()
    figure.savefig(path, dpi=100)
