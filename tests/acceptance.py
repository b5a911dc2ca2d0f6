"""Checks a run's summary.json against what the tiny recipe must show: `python tests/acceptance.py first|again`."""

from __future__ import annotations

import json
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

SUMMARY = Path("runs/latest/summary.json")
NEVER_SKIPPED = {"register", "rollout", "report"}
MAX_BYTES = 8_000_000_000
LEAST = {"shapes": 0.80, "digits": 0.90, "clips": 0.90}
"""Accuracy by source; what the README states is a few points more."""
SOURCES = set(LEAST)


def first_run(summary: dict[str, Any]) -> Iterator[tuple[str, bool]]:
    """What the first run of the tiny recipe must show, each with whether it does."""
    yield from any_run(summary)
    peak = summary["peak_pss_bytes"]
    yield f"peak memory {peak / 1e9:.2f} GB, at most {MAX_BYTES / 1e9:.0f}", 0 < peak <= MAX_BYTES
    for source, row in summary["accuracy"].items():
        full, blind = row["full"], row["question_only"]["high"]
        said = f"{source}: {full['value']:.3f} (from {full['low']:.3f}) above question only (to {blind:.3f})"
        yield said, full["low"] > blind
        yield f"{source}: {full['n']} held-out questions", full["n"] >= 1000
        yield f"{source}: quantized {row['quantized']}", row["quantized"] is not None
    for source, least in LEAST.items():
        value = summary["accuracy"][source]["full"]["value"] if source in summary["accuracy"] else 0
        yield f"{source} {value:.3f}, at least {least}", value >= least
    stages = summary["stages"]
    for source, stage, before in (("digits", "train-4", "train-3"), ("clips", "train-5", "train-4")):
        old, new = (stages[step][source]["value"] for step in (before, stage))
        yield f"{stage} takes {source} from {old:.3f} to {new:.3f}", new > old


def second_run(summary: dict[str, Any]) -> Iterator[tuple[str, bool]]:
    """What a run must show that follows an equal one."""
    yield from any_run(summary)
    for step in summary["steps"]:
        if step["name"] not in NEVER_SKIPPED:
            yield f"{step['name']} is cached", step["cached"]


def any_run(summary: dict[str, Any]) -> Iterator[tuple[str, bool]]:
    """What every successful run must show."""
    yield f"decision {summary['decision']}", summary["decision"] == "promoted"
    yield f"exit code {summary['exit_code']}", summary["exit_code"] == 0
    yield "accuracy of every source", set(summary["accuracy"]) == SOURCES
    yield f"endpoint {summary['endpoint']} answers", _answers(summary["endpoint"])


def _answers(url: str | None) -> bool:
    if not url:
        return False
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=10) as answer:
            return answer.status == 200
    except OSError:
        return False


def main() -> int:
    """Print every check; 1 when one fails."""
    checks = {"first": first_run, "again": second_run}[sys.argv[1]]
    summary = json.loads(SUMMARY.read_text(encoding="utf-8"))
    print(f"took {summary['seconds_total'] / 60:.1f} min")  # a machine may be slow: no check fails on time
    results = list(checks(summary))
    for text, good in results:
        print(f"{'ok  ' if good else 'FAIL'} {text}")
    return 0 if all(good for _, good in results) else 1


if __name__ == "__main__":
    raise SystemExit(main())
