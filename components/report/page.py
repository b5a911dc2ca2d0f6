"""Turns a run into the numbers, rows and charts that the template lays out; knows nothing of HTML beyond the charts."""

from __future__ import annotations

import json
import math
from itertools import accumulate
from typing import Any

from nvila.components.contracts import jsonlines
from nvila.components.contracts.exits import Exit
from nvila.components.contracts.meter import METER, measures
from nvila.components.contracts.metrics import named
from nvila.components.contracts.results.accuracy import Evaluation, QuantizedEvaluation
from nvila.components.contracts.results.model import Quantization, Training, Validation
from nvila.components.contracts.results.run import Registration, Resolution, Rollout
from nvila.components.contracts.steps import ROWS, STAGES
from nvila.components.contracts.text import duration
from nvila.components.metrics.standing import Compared, above, change, compared, headline, standing, what_was_measured
from nvila.components.report import charts, flow
from nvila.components.report.gallery import cards
from nvila.components.report.pruning import prune_parts
from nvila.components.report.quarantine import quarantine_file, reasons, set_aside
from nvila.components.runner.status import Run, Status
from nvila.components.tracking.flatten import parameters

QUARANTINE_ROWS = 60
CURVE_POINTS = 300


def context(run: Run) -> dict[str, Any]:
    """Everything the template needs. Each part is empty where its step did not get that far."""
    began, ended = run.span
    rows = flow.rows(run)
    recipe, validation, evaluation = run.result(Resolution), run.result(Validation), run.result(Evaluation)
    return {
        "run": run.name,
        "recipe": recipe.name if recipe else "",
        "verdict": verdict(run),
        "total": duration(ended - began),
        "rows": rows,
        "rail": flow.rail(run, len(rows)),
        "row_pixels": flow.ROW_PIXELS,
        "accuracy": accuracy_rows(run),
        "what": what_was_measured(_compared(run).values()),
        "accuracy_chart": _accuracy_chart(run),
        "stages": evaluation.stages if evaluation else {},
        "stages_chart": _stages_chart(run),
        "curves": loss_curves(run),
        "prune": prune_parts(run),
        "cards": cards(run),
        "counts": validation.records if validation else {},
        "quarantine": quarantine(run),
        "quantization": run.result(Quantization),
        "version": run.result(Registration),
        "serving": run.result(Rollout),
        "lineage": _lineage(run),
        "sources": _sources(run),
        "settings": {step: parameters(part or {}) for step, part in recipe.slices.items()} if recipe else {},
    }


def verdict(run: Run) -> dict[str, str]:
    """The headline: `tone` (good, bad, neutral), `title`, `text`."""
    if bad := run.trouble:
        titles = {Status.REJECTED: f"Rejected by {bad.name}", Status.PREEMPTED: f"Interrupted in {bad.name}"}
        return {
            "tone": "neutral" if bad.status is Status.PREEMPTED else "bad",
            "title": f"{titles.get(bad.status, f'Failed in {bad.name}')} (exit code {bad.exit_code or Exit.FAULT:d})",
            "text": bad.message or "",
        }
    if lost := run.lost:
        text = "It left no word. Too little memory and a lost machine are the usual reasons."
        return {"tone": "bad", "title": f"Killed in {lost.name}", "text": text}
    if left := flow.unfinished(run):
        return {"tone": "neutral", "title": "Not finished", "text": f"The run was ended before {left[0]} began."}
    rollout = run.result(Rollout)
    version = f"{rollout.model} version {rollout.version}" if rollout else "the model"
    where = f"Rollout: {rollout.decision}" if rollout else ""
    served = rollout and (rollout.endpoint or ", ".join(rollout.hostnames))
    state, text = ("serving", served) if served else ("registered", where)
    found = headline(run.result(Evaluation), run.result(QuantizedEvaluation))
    if found.good:
        return {"tone": "good", "title": f"{version} is {state}", "text": text}
    return {"tone": "neutral", "title": f"{version} is {state}, but {found.text}", "text": text}


def accuracy_rows(run: Run) -> list[dict[str, Any]]:
    """One row per source: what was measured, and what may be said of it."""
    full, quantized = run.result(Evaluation), run.result(QuantizedEvaluation)
    rows = []
    for source, m in compared(full, quantized).items():
        after = quantized.accuracy.get(source) if quantized else None
        said = full and standing(full.accuracy[source], after)
        rows.append(
            {
                "source": source,
                "named": named(source, m.full.metric),
                "measured": m,
                "change": change(after) if after else None,
                "above": above(m.full, m.question_only),
                "kept": said == "learnt",
            }
        )
    return rows


def loss_curves(run: Run) -> list[dict[str, Any]]:
    """Per training stage: its name, a chart of the loss (raw and smoothed, with gaps where a step had none), the first
    and last smoothed values, and what it measured of itself in words."""
    found, trained = [], run.results(Training)
    for number, step in enumerate(STAGES):
        path = run.file(step, "loss.jsonl")
        if path is None:
            continue
        losses = {float(r["step"]): r["loss"] for r in jsonlines.whole(path) if "loss" in r}
        points = [(step, float(loss)) for step, loss in losses.items() if loss is not None]
        if not points:
            continue
        smooth, gaps = _smoothed(points), [(step, math.nan) for step, loss in losses.items() if loss is None]
        measured = measures(path.with_name(METER))
        lines = [
            charts.Line(number, "loss", sorted([*_thinned(points), *gaps]), faint=True),
            charts.Line(number, "smoothed loss", sorted([*_thinned(smooth), *gaps])),
        ]
        found.append(
            {
                "title": f"Stage {number + 1}",
                "name": trained[step].name if step in trained else "",
                "steps": len(losses),
                "learnt": _learnt(trained.get(step)),
                "first": smooth[0][1],
                "last": smooth[-1][1],
                "measured": ", ".join(measured.words) if measured else "",
                "chart": charts.line_plot(lines, f"Loss of {step}", height=150),
            }
        )
    return found


def _learnt(told: Training | None) -> str:
    """Which parts a stage trained, how, and how much of them."""
    if told is None:
        return ""
    parts = [
        f"{part} {told.methods.get(part, '')} ({number:,})".replace(" full ", " ")
        for part, number in told.trained_parameters.items()
    ]
    adapter = f", adapters of {told.adapter_bytes / 1e6:,.1f} MB" if told.adapter_bytes else ""
    words = [f"trained parameters: {', '.join(parts)}{adapter}"] if parts else []
    if told.fp8:
        taken = f"{sum(told.fp8.linears.values())} Linears of the decoder in FP8 ({told.fp8.scaling})"
        words.append(f"{taken} by {told.fp8.backend} {told.fp8.version}")
    return "; ".join(words)


def quarantine(run: Run) -> dict[str, Any]:
    """What validation set aside: the reasons, the first records (column names, rows), how many in all, and where."""
    records = set_aside(run)
    columns = list(dict.fromkeys(key for record in records for key in record))
    rows = [[_short(record.get(column)) for column in columns] for record in records[:QUARANTINE_ROWS]]
    found = {"columns": columns, "rows": rows, "total": len(records), "reasons": reasons(records)}
    return found | {"file": str(quarantine_file(run) or "")}


def _accuracy_chart(run: Run) -> str:
    groups, sources = [], _compared(run)
    for source, m in sources.items():
        found = ((0, "full model", m.full), (1, "quantized", m.quantized), (7, "question only", m.question_only))
        dots = [charts.Dot(series, label, v.value, v.low, v.high) for series, label, v in found if v]
        groups.append((source, [*dots, charts.Dot(7, "majority", m.majority.value)]))
    words = what_was_measured(sources.values())
    return charts.dot_plot(groups, f"{words} with 95% intervals beside baselines") if groups else ""


def _compared(run: Run) -> dict[str, Compared]:
    return compared(run.result(Evaluation), run.result(QuantizedEvaluation))


def _stages_chart(run: Run) -> str:
    evaluation = run.result(Evaluation)
    stages = evaluation.stages if evaluation else {}
    sources = list(dict.fromkeys(source for measured in stages.values() for source in measured))
    lines = [
        charts.Line(i, source, [(x, m[source].value) for x, m in enumerate(stages.values()) if source in m])
        for i, source in enumerate(sources)
    ]
    labels = [f"stage {STAGES.index(name) + 1}" if name in STAGES else name for name in stages]
    return charts.line_plot(lines, "Accuracy after each stage", x_labels=labels, y_range=(0, 1), marks=True)


def _lineage(run: Run) -> list[dict[str, Any]]:
    order = {name: i for i, name in enumerate(ROWS)}
    return [
        {
            "step": manifest.step,
            "digest": manifest.digest,
            "inputs": {name: ref.digest for name, ref in manifest.inputs.items()},
            "folder": manifest.folder,
        }
        for manifest in sorted(run.manifests.values(), key=lambda m: order.get(m.step, len(order)))
    ]


def _sources(run: Run) -> list[dict[str, Any]]:
    """The user's files, without those beyond the first hundred."""
    found = {file.uri: file for manifest in run.manifests.values() for file in manifest.sources}
    return [{"uri": f.uri, "bytes": f.size_bytes, "sha256": f.sha256} for f in list(found.values())[:100]]


def _short(value: Any, limit: int = 160) -> str:
    text = value if isinstance(value, str) else "" if value is None else json.dumps(value)
    return text if len(text) <= limit else text[: limit - 1] + "…"


def _smoothed(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Centred moving average over a twentieth of the curve (narrower towards the ends), which does not lag behind."""
    half = max(1, len(points) // 40)
    sums = [0.0, *accumulate(loss for _, loss in points)]
    found = []
    for index, (step, _) in enumerate(points):
        reach = min(half, index, len(points) - 1 - index)
        low, high = index - reach, index + reach + 1
        found.append((step, (sums[high] - sums[low]) / (high - low)))
    return found


def _thinned(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    every = max(1, len(points) // CURVE_POINTS)
    return points[::every] + ([points[-1]] if (len(points) - 1) % every else [])
