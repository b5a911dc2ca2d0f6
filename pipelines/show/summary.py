"""`summary.json`: the numbers of one run for programs, gathered from its status files and manifests."""

from __future__ import annotations

import json
from typing import Any

from nvila.components.contracts.exits import Exit
from nvila.components.contracts.manifest import write_atomic
from nvila.components.metrics.standing import Headline, headline
from nvila.components.runner.status import Run, Status
from nvila.components.tracking.redact import redact_text
from nvila.pipelines.steps import STEPS

SUMMARY = "summary.json"
LOG = "log.txt"
"""In the run's folder: everything that KFP and the steps print."""


def write_summary(run: Run, seconds_total: float, peak_pss_bytes: int, exit_code: int) -> dict[str, Any]:
    """Write the run's `summary.json` and return its content."""
    summary = {
        "run": run.name,
        "recipe": run.values("resolve").get("recipe", {}).get("name"),
        "exit_code": int(exit_code),
        "decision": _decision(run, exit_code),
        "message": _message(run, exit_code),
        "steps": [
            {
                "name": step.name,
                "status": step.status,
                "seconds": round(step.seconds, 3),
                "cached": step.status is Status.CACHED,
            }
            for step in map(run.step, STEPS)
        ],
        "headline": verdict(run).text,
        "accuracy": accuracy(run),
        "stages": run.values("evaluate").get("stages", {}),
        "endpoint": run.values("rollout").get("endpoint"),
        "seconds_total": round(seconds_total, 3),
        "seconds_overhead": round(max(seconds_total - _work_seconds(run), 0.0), 3),
        "peak_pss_bytes": peak_pss_bytes,
    }
    write_atomic(run.folder / SUMMARY, json.dumps(summary, indent=1) + "\n")
    return summary


def verdict(run: Run) -> Headline:
    """What may be said of the model by what was measured."""
    return headline(*(run.values(step).get("accuracy", {}) for step in ("evaluate", "evaluate-quantized")))


def _work_seconds(run: Run) -> float:
    """Time inside the steps' own functions: what is left of the whole is overhead. Skipped steps worked 0 s."""
    return sum(
        run.manifests[step.name].seconds if step.status is Status.DONE and step.name in run.manifests else step.seconds
        for step in run.steps.values()
        if step.status is not Status.CACHED
    )


def _decision(run: Run, exit_code: int) -> str:
    """`promoted` and the like from the rollout; else `rejected`, `preempted` or `failed`."""
    if exit_code == Exit.DONE:
        return str(run.values("rollout")["decision"])
    return {Exit.REJECTED: "rejected", Exit.PREEMPTED: "preempted"}.get(Exit(exit_code), "failed")


def _message(run: Run, exit_code: int) -> str | None:
    """Why the run did not come through: the step's own words, else the last line of the log."""
    if exit_code == Exit.DONE:
        return None
    bad = run.trouble
    if exit_code == Exit.PREEMPTED and bad and bad.exit_code == exit_code:
        return redact_text(f"{bad.name} stopped: {bad.message}")
    if exit_code == Exit.PREEMPTED:
        return "stopped; the same command goes on from here"
    if bad:
        return redact_text(f"{bad.name} {bad.status}: {bad.message}")
    if run.lost:
        return f"{run.lost.name} was killed before it could say why; too little memory is the usual reason"
    log = run.folder / LOG
    lines = log.read_text(encoding="utf-8", errors="replace").split("\n") if log.is_file() else []
    return next((redact_text(line.strip()) for line in reversed(lines) if line.strip()), None)


def accuracy(run: Run) -> dict[str, dict[str, Any]]:
    """Exact match per source: trained, quantized, and the baselines; null where the step did not come through."""
    full = run.values("evaluate").get("accuracy", {})
    quantized = run.values("evaluate-quantized").get("accuracy", {})
    found = {}
    for source, row in full.items():
        small = quantized.get(source, {})
        blind = row["question_only"]
        found[source] = {
            "bf16": row["accuracy"],
            "bf16_interval": [row["low"], row["high"]],
            "quantized": small.get("accuracy"),
            "quantized_interval": [small["low"], small["high"]] if small else None,
            "majority": row["majority"],
            "question_only": blind["accuracy"],
            "question_only_interval": [blind["low"], blind["high"]],
            "question_only_kind": blind["kind"],
            "n": row["n"],
        }
    return found
