"""What the result of every experiment says of itself: by what command, commit and machine, and what it has cost."""

from __future__ import annotations

import json
import os
import platform
import resource
import subprocess
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from nvila.components.contracts.errors import NvilaError
from nvila.components.contracts.files import read_json, write_atomic
from nvila.components.contracts.manifest import Manifest
from nvila.components.contracts.recipe.recipe import Recipe
from nvila.components.contracts.store import Store
from nvila.components.runner.code import code_digest
from nvila.components.runner.work import machine
from nvila.pipelines.ablate.work import Task

LIBRARIES = ("torch", "transformers", "deepspeed", "numpy", "scipy", "scikit-learn")
OWN = "the command itself"
Costs = Mapping[str, Any]


def provenance(command: Sequence[str], recipe: Recipe) -> dict[str, Any]:
    """Where the numbers come from."""
    return {
        "schema_version": 1,
        "command": list(command),
        "written": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "code": code_digest(),
        "machine": machine("") | {"cores": len(os.sched_getaffinity(0)), "python": platform.python_version()},
        "libraries": {name: version(name) for name in LIBRARIES},
        "recipe": recipe.model_dump(mode="json", by_alias=True),
    }


def spent(costs: Sequence[Costs]) -> dict[str, float]:
    """Seconds and CPU seconds of cases and shared steps together."""
    return {
        "cpu_seconds": round(sum(one.get("cpu_seconds") or 0.0 for one in costs), 1),
        "work_seconds": round(sum(one.get("seconds") or 0.0 for one in costs), 1),
    }


def charge_own(ledger: Path) -> None:
    """Add to the ledger what this process itself has spent: imports and pictures that all cases share."""
    used, known = resource.getrusage(resource.RUSAGE_SELF), read_json(ledger)
    before = known.get(OWN, {}).get("cpu_seconds", 0.0)
    known[OWN] = {"cpu_seconds": round(before + used.ru_utime + used.ru_stime, 1)}
    write_atomic(ledger, json.dumps(known, indent=1))


def costs_of(manifests: Mapping[str, Manifest], ledger: Path) -> dict[str, dict[str, Any]]:
    """What each shared step has cost, and the command itself."""
    known, found = read_json(ledger), {}
    for name, manifest in manifests.items():
        told = known.get(f"{manifest.step}/{manifest.key}")
        # Made by a run, which keeps no CPU time: all its threads, all the time, at most.
        most = round(manifest.seconds * int(manifest.machine.get("threads", 1)), 1)
        cost = told or {"seconds": manifest.seconds, "cpu_seconds": most, "at_most": True}
        found[name] = {"key": manifest.key} | cost
    return found | ({OWN: known[OWN]} if OWN in known else {})


def all_finished(tasks: Sequence[Task], store: Store) -> list[Manifest]:
    """What the tasks have made.

    Raises:
        NvilaError: one of them has not.
    """
    made = [task.finished(store) for task in tasks]
    if lost := [task.name for task, manifest in zip(tasks, made, strict=True) if manifest is None]:
        raise NvilaError(f"{len(lost)} cases are not in the store", value=lost[0], do="Run the same command again.")
    return [manifest for manifest in made if manifest]


def commit() -> str | None:
    """Of the checkout that this code lies in; None where it is installed elsewhere."""
    try:
        asked = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
        return subprocess.run(asked, capture_output=True, text=True, timeout=10).stdout.strip() or None
    except (OSError, subprocess.TimeoutExpired):
        return None
