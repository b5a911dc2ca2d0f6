"""Step `evaluate-quantized`: the same questions to the quantized model, as it will be served, and what it lost."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nvila.components.contracts.manifest import Manifest
from nvila.components.contracts.recipe.evaluate import Tasks
from nvila.components.contracts.recipe.section import Questions, Section
from nvila.components.contracts.results.accuracy import QuantizedEvaluation, Retained
from nvila.components.contracts.step import Outcome
from nvila.components.data.samples import Sample, read_samples
from nvila.components.metrics.accuracy import fall, is_correct, measured, scores


class Settings(Section):
    """Slice of `evaluate-quantized`."""

    evaluate: Tasks
    limit: Questions | None
    """Questions per source; None is as many as the full model answered."""
    through_vllm: bool


def run(settings: Settings, inputs: Mapping[str, Manifest], out: Path) -> Outcome:
    """Ask the quantized model what the full model was asked.

    Args:
        settings: tasks, and how the quantized model is run.
        inputs: `model` (of quantize), `metrics` (of evaluate: its predictions are compared with), `samples`.
        out: gets `predictions.parquet`.

    Raises:
        PreflightError: the serving environment is not there.
        RolloutError: vLLM failed.
    """
    import pyarrow
    import pyarrow.parquet as parquet

    began = time.monotonic()
    before = _first_of_each_source(
        parquet.read_table(inputs["metrics"].path("predictions.parquet")).to_pylist(), settings.limit
    )
    by_id = {s.id: s for s in read_samples(inputs["samples"].path("samples.parquet"), split="heldout")}
    samples = [by_id[row["id"]] for row in before]
    ask = _through_vllm if settings.through_vllm else _through_torch
    predicted = ask(inputs["model"].dir("model"), samples, settings, out)
    rows = [
        {**row, "prediction_full": row["prediction"], "prediction": p, "correct": is_correct(p, row["answer"])}
        for row, p in zip(before, predicted, strict=True)
    ]
    parquet.write_table(pyarrow.Table.from_pylist(rows), out / "predictions.parquet")
    seconds = time.monotonic() - began
    return Outcome(
        kind="metrics",
        result=QuantizedEvaluation(
            accuracy=_compare(settings.evaluate, before, rows),
            same_answer=round(sum(is_correct(r["prediction"], r["prediction_full"]) for r in rows) / len(rows), 4),
            through="vllm" if settings.through_vllm else "torch",
            max_new_tokens=settings.evaluate.max_new_tokens,
        ),
        files=("predictions.parquet",),
        measured={"seconds": seconds, "questions_per_second": len(rows) / seconds},
    )


def _first_of_each_source(rows: list[dict[str, Any]], limit: int | None) -> list[dict[str, Any]]:
    sources = dict.fromkeys(row["source"] for row in rows)
    return [row for source in sources for row in [r for r in rows if r["source"] == source][:limit]]


def _compare(tasks: Tasks, before: list[dict[str, Any]], after: list[dict[str, Any]]) -> dict[str, Retained]:
    """What is left of each source's value."""
    found = {}
    for source in dict.fromkeys(row["source"] for row in before):
        metric = tasks.metric(source)
        full, now = (
            scores(metric, [row["prediction"] for row in mine], [row["answer"] for row in mine])
            for mine in ([row for row in rows if row["source"] == source] for rows in (before, after))
        )
        lost, noise = fall(full, now)
        found[source] = Retained(
            **measured(metric, now).model_dump(),
            full=measured(metric, full),
            fall=round(lost, 4),
            fall_noise=round(noise, 4),
        )
    return found


def _through_vllm(model: Path, samples: list[Sample], settings: Settings, out: Path) -> list[str]:
    from nvila.components.serve.batch import Request, generate_with_vllm

    requests = [
        Request(media=[str(path) for path in s.paths], kind=s.kind, question=s.conversations[0].text, limits=s.limits)
        for s in samples
    ]
    return generate_with_vllm(model, requests, max_new_tokens=settings.evaluate.max_new_tokens, work=out)


def _through_torch(model: Path, samples: list[Sample], settings: Settings, out: Path) -> list[str]:
    from nvila.components.metrics.answers import Questions, answers
    from nvila.components.model.checkpoint.quantized import load_quantized
    from nvila.components.model.feed import Feed

    nvila, tokenizer = load_quantized(model)
    prompts = Questions.prepare(samples, Feed(tokenizer, nvila.config)).prompts("own")
    tasks = settings.evaluate
    return answers(
        nvila, tokenizer, prompts, batch=tasks.batch, max_new_tokens=tasks.max_new_tokens, what="quantized model"
    )
