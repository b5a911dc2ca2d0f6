"""Ends in MLflow what runs have left open that were killed outright, as the next run of the same folder finds it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from nvila.components.contracts.environment import current
from nvila.components.tracking.connect import connected, experiment_id, has_store, pages
from nvila.components.tracking.runs import folder_of


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
        # All of them first: what is closed moves later pages forward.
        for run in list(pages(client.search_runs, [experiment_id(client, runs)], "attributes.status = 'RUNNING'")):
            folder = folder_of(runs, run)
            if folder and (ended := ended_at(folder)) is not None:
                client.set_terminated(run.info.run_id, "KILLED", max(int(ended * 1000), run.info.start_time))
