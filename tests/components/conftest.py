"""What tests of several components share."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from nvila.components.tracking.connect import connected


@pytest.fixture(scope="session")
def empty_mlflow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sqlite store with its tables made, to be copied: making them takes seconds."""
    runs = tmp_path_factory.mktemp("mlflow")
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        with connected(runs) as client:
            client.search_experiments()
    return runs / "mlflow.db"


@pytest.fixture
def tracked_run(tmp_path: Path, empty_mlflow: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Folder of a pipeline run (`NVILA_RUN`) whose runs folder holds a real, empty MLflow store."""
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI", "MLFLOW_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    run = tmp_path / "runs" / "r1"
    run.mkdir(parents=True)
    shutil.copyfile(empty_mlflow, run.parent / "mlflow.db")
    monkeypatch.setenv("NVILA_RUN", str(run))
    return run
