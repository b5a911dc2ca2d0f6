"""Ends in MLflow what runs have left open that were killed outright, as the next run of the same machine finds it."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import ValidationError

from nvila.components.contracts.environment import current
from nvila.components.contracts.processes import Process
from nvila.components.tracking.connect import connected, experiment_id, has_store, pages
from nvila.components.tracking.runs import PROCESS_TAG, folder_of

if TYPE_CHECKING:
    from mlflow.entities import Run


def close_abandoned(runs: Path, ended_at: Callable[[Path], float | None]) -> None:
    """Mark as KILLED each open run, and each open step of it, whose pipeline run is dead.

    Args:
        runs: folder of pipeline runs. Of what the tracking store holds of other folders only that is closed whose tags
            name a process of this machine that has ended.
        ended_at: from the folder of a pipeline run to the seconds since the epoch at which it was last alive; None
            where it lives, or nobody knows.
    """
    if current().mlflow_run_id or not has_store(runs):
        return
    with connected(runs) as client:
        # All of them first: what is closed moves later pages forward.
        for run in list(pages(client.search_runs, [experiment_id(client, runs)], "attributes.status = 'RUNNING'")):
            folder = folder_of(runs, run)
            if (ended := ended_at(folder) if folder else _ended(run)) is not None:
                client.set_terminated(run.info.run_id, "KILLED", max(int(ended * 1000), run.info.start_time))


def _ended(run: Run) -> float | None:
    """Now, where the process that ran it is known to have ended: nobody knows when."""
    try:
        owner = Process.model_validate_json(run.data.tags.get(PROCESS_TAG, ""))
    except ValidationError:
        return None
    return time.time() if owner.alive is False else None
