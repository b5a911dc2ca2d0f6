"""Turns a run into the numbers, rows and charts that the template lays out; knows nothing of HTML beyond the charts."""

from __future__ import annotations

import json
from collections.abc import Mapping
from itertools import accumulate
from typing import Any

from nvila.components.metrics.standing import above, change, headline, standing
from nvila.components.report import charts, flow
from nvila.components.report.gallery import cards, table
from nvila.components.runner.status import Run, Status
from nvila.components.tracking.flatten import parameters

STAGES = ("base", "train-1", "train-2", "train-3", "train-4", "train-5")
QUARANTINE_ROWS = 60
CURVE_POINTS = 300


def context(run: Run) -> dict[str, Any]:
    """Everything the template needs. Each part is empty where its step did not get that far."""
    began, ended = run.span
    rows = flow.rows(run)
    return {
        "run": run.name,
        "recipe": _recipe(run),
        "verdict": verdict(run),
        "total": flow.duration(ended - began),
        "rows": rows,
        "rail": flow.rail(run, len(rows)),
        "row_pixels": flow.ROW_PIXELS,
        "accuracy": accuracy_rows(run),
        "accuracy_chart": _accuracy_chart(run),
        "stages": run.values("evaluate").get("stages", {}),
        "stages_chart": _stages_chart(run),
        "curves": loss_curves(run),
        "prune": prune_parts(run),
        "cards": cards(run),
        "counts": run.values("validate").get("records", {}),
        "quarantined": run.values("validate").get("quarantined", {}),
        "quarantine": quarantine(run),
        "quantize": run.values("quantize"),
        "register": run.values("register"),
        "rollout": run.values("rollout"),
        "lineage": _lineage(run),
        "sources": _sources(run),
        "settings": _settings(run),
    }


def verdict(run: Run) -> dict[str, str]:
    """The headline: `tone` (good, bad, neutral), `title`, `text`."""
    if bad := run.trouble:
        titles = {Status.REJECTED: f"Rejected by {bad.name}", Status.PREEMPTED: f"Interrupted in {bad.name}"}
        return {
            "tone": "neutral" if bad.status is Status.PREEMPTED else "bad",
            "title": titles.get(bad.status, f"Failed in {bad.name}"),
            "text": bad.message or "",
        }
    if lost := run.lost:
        text = "It left no word. Too little memory and a lost machine are the usual reasons."
        return {"tone": "bad", "title": f"Killed in {lost.name}", "text": text}
    if left := flow.unfinished(run):
        return {"tone": "neutral", "title": "Not finished", "text": f"The run was ended before {left[0]} began."}
    rollout = run.values("rollout")
    version = f"{rollout.get('model', 'model')} version {rollout.get('version', '?')}"
    where = f"Rollout: {rollout.get('decision', '')}"
    state, text = ("serving", str(rollout["endpoint"])) if rollout.get("endpoint") else ("registered", where)
    found = headline(run.values("evaluate").get("accuracy", {}), run.values("evaluate-quantized").get("accuracy", {}))
    if found.good:
        return {"tone": "good", "title": f"{version} is {state}", "text": text}
    return {"tone": "neutral", "title": f"{version} is {state}, but {found.text}", "text": text}


def accuracy_rows(run: Run) -> list[dict[str, Any]]:
    """One row per source: the full model, its baselines, and the quantized model."""
    full = run.values("evaluate").get("accuracy", {})
    after = run.values("evaluate-quantized").get("accuracy", {})
    rows = []
    for source, measured in full.items():
        quantized = after.get(source)
        only = measured.get("question_only") or {}
        rows.append(
            {
                "source": source,
                "full": measured,
                "only": only,
                "quantized": quantized,
                "change": change(measured, quantized) if quantized else None,
                "above": above(measured, only),
                "kept": standing(measured, quantized) == "learnt",
            }
        )
    return rows


def loss_curves(run: Run) -> list[dict[str, Any]]:
    """Per training stage: its name, a chart of the loss (raw and smoothed), the first and last smoothed values."""
    found = []
    for number, step in enumerate(STAGES[1:]):
        path = run.file(step, "loss.jsonl")
        if path is None:
            continue
        points = [
            (float(r["step"]), float(r["loss"])) for r in _json_lines(path.read_text()) if r.get("loss") is not None
        ]
        if not points:
            continue
        smooth = _smoothed(points)
        lines = [
            charts.Line(number, "loss", _thinned(points), faint=True),
            charts.Line(number, "smoothed loss", _thinned(smooth)),
        ]
        name = run.values(step).get("stage", {}).get("name", "")
        found.append(
            {
                "step": step,
                "name": name,
                "steps": len(points),
                "first": smooth[0][1],
                "last": smooth[-1][1],
                "chart": charts.line_plot(lines, f"Loss of {step}", height=150),
            }
        )
    return found


def prune_parts(run: Run) -> list[dict[str, Any]]:
    """Per pruned source: what stayed, how good the reference models are, and the histogram of DeltaLoss."""
    found = []
    for step in ("prune-image", "prune-video"):
        scores = table(run.file(step, "scores.parquet"))
        for source, told in run.values(step).get("sources", {}).items():
            mine = [row for row in scores if row["source"] == source]
            chart = charts.histogram(
                [row["delta"] for row in mine if row["kept"]],
                [row["delta"] for row in mine if not row["kept"]],
                f"DeltaLoss of {source}",
            )
            found.append({"source": source, "told": told, "chart": chart})
    return found


def quarantine(run: Run) -> dict[str, Any]:
    """The first records that validation set aside: column names, rows, how many there are in all."""
    path = run.file("validate", "quarantine.jsonl")
    records = _json_lines(path.read_text()) if path else []
    columns = list(dict.fromkeys(key for record in records for key in record))
    rows = [[_short(record.get(column)) for column in columns] for record in records[:QUARANTINE_ROWS]]
    return {"columns": columns, "rows": rows, "total": len(records)}


def _accuracy_chart(run: Run) -> str:
    groups = []
    for row in accuracy_rows(run):
        dots = [charts.Dot(0, "full model", row["full"]["accuracy"], row["full"].get("low"), row["full"].get("high"))]
        if row["quantized"]:
            q = row["quantized"]
            dots.append(charts.Dot(1, "quantized", q["accuracy"], q.get("low"), q.get("high")))
        if row["only"]:
            only = row["only"]
            dots.append(charts.Dot(7, "question only", only["accuracy"], only.get("low"), only.get("high")))
        if "majority" in row["full"]:
            dots.append(charts.Dot(7, "majority", row["full"]["majority"]))
        groups.append((row["source"], dots))
    return charts.dot_plot(groups, "Exact match with 95% intervals beside baselines") if groups else ""


def _stages_chart(run: Run) -> str:
    stages = run.values("evaluate").get("stages", {})
    shown = [stage for stage in STAGES if stage in stages]
    sources = list(dict.fromkeys(source for stage in shown for source in stages[stage]))
    lines = [
        charts.Line(i, source, [(x, stages[stage][source]) for x, stage in enumerate(shown) if source in stages[stage]])
        for i, source in enumerate(sources)
    ]
    labels = [stage.replace("train-", "stage ") for stage in shown]
    return charts.line_plot(lines, "Accuracy after each stage", x_labels=labels, y_range=(0, 1), marks=True)


def _recipe(run: Run) -> str:
    recipe = run.values("resolve").get("recipe", {})
    return recipe.get("name", "") if isinstance(recipe, Mapping) else str(recipe)


def _lineage(run: Run) -> list[dict[str, Any]]:
    order = {name: i for i, (name, *_) in enumerate(flow.DAG)}
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


def _settings(run: Run) -> dict[str, dict[str, str]]:
    return {step: parameters(part) for step, part in run.values("resolve").get("slices", {}).items()}


def _json_lines(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines() if line.strip()]


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
