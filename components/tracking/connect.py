"""Where MLflow keeps things and how we reach it: late import, no telemetry, one writer at a time on sqlite.

The first use of a new sqlite store creates its tables (2.6 s; later about 1 s a process, half of it import).
"""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from nvila.components.contracts.environment import before_importing, current

if TYPE_CHECKING:
    from mlflow import MlflowClient

EXPERIMENT = "nvila"


def tracking_uri(runs: Path) -> str:
    """`MLFLOW_TRACKING_URI`, else a sqlite file in the runs folder (no server is needed)."""
    return current().mlflow_tracking_uri or f"sqlite:///{runs.absolute()}/mlflow.db"


def has_store(runs: Path) -> bool:
    """Whether there is anything to read: connecting to the local default would make an empty one."""
    return current().mlflow_tracking_uri is not None or (runs / "mlflow.db").is_file()


def load_client() -> type[MlflowClient]:
    """Import MLflow (two seconds), without telemetry and chatter."""
    before_importing("mlflow")
    from mlflow import MlflowClient

    return MlflowClient


@contextmanager
def connected(runs: Path) -> Iterator[MlflowClient]:
    """A client on the tracking store and registry of a runs folder, which no other process of ours uses meanwhile.

    MLflow itself waits up to 20 s for sqlite; the lock also covers the making of the tables, which it does not guard.
    """
    client = load_client()
    runs.mkdir(parents=True, exist_ok=True)
    with (runs / ".mlflow.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        uri = tracking_uri(runs)
        yield client(uri, registry_uri=current().mlflow_registry_uri or uri)


def experiment_id(client: MlflowClient, runs: Path) -> str:
    """The experiment `nvila`, made when missing. On sqlite its artifacts lie in the runs folder."""
    if found := client.get_experiment_by_name(EXPERIMENT):
        return found.experiment_id
    local = tracking_uri(runs).startswith("sqlite:")
    return client.create_experiment(
        EXPERIMENT, artifact_location=(runs.absolute() / "mlartifacts").as_uri() if local else None
    )
