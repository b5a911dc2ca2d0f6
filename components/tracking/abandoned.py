"""Ends in MLflow what runs have left open that were killed outright, as the next run of the same folder finds it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from nvila.components.contracts.environment import current
from nvila.components.tracking.connect import connected, experiment_id, has_store
from nvila.components.tracking.runs import PARENT_FILE

if TYPE_CHECKING:
    from mlflow.entities import Run


def close_abandoned(runs: Path, ended_at: Callable[[Path], float | None]) -> None:
    """Mark as KILLED each open run, and each open step of it, whose pipeline run is dead.

    Args:
        runs: folder of pipeline runs; what the tracking store holds of runs of other folders is left alone.
        ended_at: from the folder of a pipeline run to the seconds since the epoch at which it was last alive; None
            where it lives, or nobody knows.
    """
    if current().mlflow_run_id or not has_store(runs):
        return
    with connected(runs) as client:
        experiments, token = [experiment_id(client, runs)], None
        open_runs: list[Run] = []
        while True:
            page = client.search_runs(experiments, "attributes.status = 'RUNNING'", page_token=token)
            open_runs += page
            if not (token := page.token):
                break
        for run in open_runs:
            folder = _folder(runs, run)
            if folder and (ended := ended_at(folder)) is not None:
                client.set_terminated(run.info.run_id, "KILLED", max(int(ended * 1000), run.info.start_time))


def _folder(runs: Path, run: Run) -> Path | None:
    """The folder whose pipeline run this is, or is a step of."""
    name = run.data.tags.get("nvila.run", "")
    known = runs / name / PARENT_FILE
    if not name or Path(name).name != name or not known.is_file():
        return None
    try:
        parent = json.loads(known.read_text(encoding="utf-8"))["run_id"]
    except (ValueError, KeyError, TypeError):
        return None
    return runs / name if parent in (run.info.run_id, run.data.tags.get("mlflow.parentRunId")) else None
