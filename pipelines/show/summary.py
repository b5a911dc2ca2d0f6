"""`summary.json`: the numbers of one run for programs, gathered from its status files and manifests."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from nvila.components.contracts.errors import NvilaError
from nvila.components.contracts.exits import Exit
from nvila.components.contracts.manifest import Manifest, write_atomic
from nvila.components.contracts.steps import EVALUATE, EVALUATE_QUANTIZED, RESOLVE, ROLLOUT
from nvila.components.contracts.text import say
from nvila.components.metrics.standing import Headline, headline
from nvila.components.tracking.redact import redact_text
from nvila.pipelines.show.watch import StepState, read_states

SUMMARY = "summary.json"
LOG = "log.txt"
"""In the run's folder: everything that KFP and the steps print."""
KILLED = "killed"
"""Status of a step that was running when its run ended: it was killed outright and left no word."""


@dataclass(frozen=True)
class Finished:
    """A run that has ended, however it ended: the states of its steps and the manifests of those that came through."""

    run_dir: Path
    states: list[StepState]
    manifests: dict[str, Manifest]

    @classmethod
    def read(cls, run_dir: Path) -> Finished:
        """Load what the status files name."""
        states = [replace(s, status=KILLED, seconds=0.0) if s.status == "running" else s for s in read_states(run_dir)]
        named = {s.name: s.record["manifest"] for s in states if s.record.get("manifest")}
        return cls(run_dir, states, {name: made for name, path in named.items() if (made := _load(path))})

    def values(self, step: str) -> dict[str, Any]:
        """Values of a step's manifest; empty where the step did not come through."""
        return self.manifests[step].values if step in self.manifests else {}

    @property
    def headline(self) -> Headline:
        """What may be said of the model by what was measured."""
        return headline(*(self.values(step).get("accuracy", {}) for step in (EVALUATE, EVALUATE_QUANTIZED)))

    @property
    def failed(self) -> StepState | None:
        """The step that ended first without success."""
        bad = [s for s in self.states if s.record.get("exit_code", 0) != 0]
        return min(bad, key=lambda s: s.record["ended"]) if bad else None

    @property
    def work_seconds(self) -> float:
        """Time inside the steps' own functions: what is left of the whole is overhead. Skipped steps worked 0 s."""
        worked = 0.0
        for state in self.states:
            if state.status == "done" and state.name in self.manifests:
                worked += self.manifests[state.name].seconds
            elif state.status != "cached":
                worked += state.seconds
        return worked


def _load(path: str) -> Manifest | None:
    """None where it is damaged or gone, which must not keep the run from being told of."""
    try:
        return Manifest.load(path)
    except NvilaError as error:
        say(redact_text(str(error)))
        return None


def write_summary(finished: Finished, seconds_total: float, peak_pss_bytes: int, exit_code: int) -> dict[str, Any]:
    """Write the run's `summary.json` and return its content."""
    found = finished.headline
    summary = {
        "run": finished.run_dir.name,
        "recipe": finished.values(RESOLVE).get("recipe", {}).get("name"),
        "exit_code": int(exit_code),
        "decision": _decision(finished, exit_code),
        "message": _message(finished, exit_code),
        "steps": [
            {"name": s.name, "status": s.status, "seconds": round(s.seconds, 3), "cached": s.status == "cached"}
            for s in finished.states
        ],
        "headline": found.text,
        "accuracy": accuracy(finished),
        "stages": finished.values(EVALUATE).get("stages", {}),
        "endpoint": finished.values(ROLLOUT).get("endpoint"),
        "seconds_total": round(seconds_total, 3),
        "seconds_overhead": round(max(seconds_total - finished.work_seconds, 0.0), 3),
        "peak_pss_bytes": peak_pss_bytes,
    }
    write_atomic(finished.run_dir / SUMMARY, json.dumps(summary, indent=1) + "\n")
    return summary


def _decision(finished: Finished, exit_code: int) -> str:
    """`promoted` and the like from the rollout; else `rejected`, `preempted` or `failed`."""
    if exit_code == Exit.DONE:
        return str(finished.values(ROLLOUT)["decision"])
    return {Exit.REJECTED: "rejected", Exit.PREEMPTED: "preempted"}.get(Exit(exit_code), "failed")


def _message(finished: Finished, exit_code: int) -> str | None:
    """Why the run did not come through: the step's own words, else the last line of the log."""
    if exit_code == Exit.DONE:
        return None
    if exit_code == Exit.PREEMPTED and (stopped := finished.failed) and stopped.record["exit_code"] == exit_code:
        return f"{stopped.name} stopped: {stopped.record.get('message')}"
    if exit_code == Exit.PREEMPTED:
        return "stopped; the same command goes on from here"
    if finished.failed:
        return redact_text(f"{finished.failed.name} {finished.failed.status}: {finished.failed.record.get('message')}")
    if killed := next((state.name for state in finished.states if state.status == KILLED), None):
        return f"{killed} was killed before it could say why; too little memory is the usual reason"
    log = finished.run_dir / LOG
    lines = log.read_text(encoding="utf-8", errors="replace").split("\n") if log.is_file() else []
    return next((redact_text(line.strip()) for line in reversed(lines) if line.strip()), None)


def accuracy(finished: Finished) -> dict[str, dict[str, Any]]:
    """Exact match per source: trained, quantized, and the baselines; null where the step did not come through."""
    full = finished.values(EVALUATE).get("accuracy", {})
    quantized = finished.values(EVALUATE_QUANTIZED).get("accuracy", {})
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
