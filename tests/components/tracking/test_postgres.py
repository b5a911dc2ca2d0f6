"""A real Postgres as the store: what it refuses, and what comes of one that is away."""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from nvila.components.contracts.environment import Environment, entered
from nvila.components.contracts.errors import ConfigError, Unreachable
from nvila.components.contracts.manifest import Manifest
from nvila.components.contracts.results.result import Other
from nvila.components.preflight.checks import Away, tracking_problems
from nvila.components.serve.ports import free_port
from nvila.components.tracking import connect
from nvila.components.tracking.connect import connected
from nvila.components.tracking.registry import register_version
from nvila.components.tracking.runs import open_step, record_step

TOOLS = next(iter(sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)), Path("/usr/bin"))

pytestmark = pytest.mark.skipif(not (TOOLS / "initdb").is_file(), reason="no Postgres is installed")


@pytest.fixture(scope="module")
def postgres() -> Iterator[str]:
    """URI of an empty database on a server of its own, which root may not run."""
    options = {"stdout": subprocess.DEVNULL, "check": True, "cwd": "/"}
    if os.geteuid() == 0:
        options |= {"user": "nobody", "group": pwd.getpwnam("nobody").pw_gid}
    place = Path(tempfile.mkdtemp(prefix="pg-", dir="/tmp"))
    place.chmod(0o777)
    data, port = place / "data", free_port("127.0.0.1")
    try:
        subprocess.run(
            [TOOLS / "initdb", "-D", data, "-U", "mlflow", "-A", "trust", "--no-sync", "-E", "UTF8"], **options
        )
        listen = f"-p {port} -k {place} -c fsync=off -c listen_addresses=127.0.0.1"
        subprocess.run([TOOLS / "pg_ctl", "-D", data, "-w", "-l", place / "log", "-o", listen, "start"], **options)
        yield f"postgresql+psycopg2://mlflow@127.0.0.1:{port}/postgres"
        subprocess.run([TOOLS / "pg_ctl", "-D", data, "-m", "immediate", "stop"], **options)
    finally:
        shutil.rmtree(place, ignore_errors=True)


def test_a_real_database_takes_whatever_is_recorded(postgres: str, tmp_path: Path) -> None:
    """sqlite keeps any length and any character; a model was trained, and refused at `register` for a long card."""
    run, folder = tmp_path / "runs" / ("r" + "é" * 100), tmp_path / "store"
    run.mkdir(parents=True)
    folder.mkdir()
    (folder / "manifest.json").write_text("{}")
    numbers = {
        "a?": 1.0,
        "a*": 2.0,
        "..": 3.0,
        "": 4.0,
        "x//y": 5.0,
        "k" * 400: 6.0,
        "inf": float("inf"),
        "nan": float("nan"),
    }
    made = Manifest(step="try", key="k" * 64, kind="metrics", result=Other(**numbers), folder=str(folder))
    settings = {"nul": "a\0b", "half": "\udcff", "long": "v" * 20_000, "k" * 400: 1, "sign": "🙂" * 600}

    def log(client):  # type: ignore[no-untyped-def]
        opened = open_step(client, run, "register")
        logged = client.create_logged_model(opened.info.experiment_id, name="small")
        return {"source": logged.artifact_location, "run_id": opened.info.run_id, "model_id": logged.model_id}

    with entered(Environment(mlflow_tracking_uri=postgres)):
        assert tracking_problems(tmp_path / "runs") == []
        record_step(run, "try", settings, {"x": made}, made, 0.0, 1.0, "\0" * 20_000, {"m": 1.0}, {"name": "v" * 9000})
        version = register_version(tmp_path / "runs", "small", "d" * 64, log, description="|" * 40_000, tags={})
        with connected(tmp_path / "runs") as client:
            child = client.search_runs(
                [client.get_experiment_by_name("nvila").experiment_id], "attributes.run_name = 'try'"
            )
        (far := tmp_path / ("f" * 150)).mkdir()
        (problem,) = tracking_problems(far)
    assert child[0].info.status == "FINISHED" and len(child[0].data.metrics) == 9 and len(child[0].data.params) == 5
    assert version.version == "1"
    assert "too long a path" in problem


def test_a_database_that_is_away_is_told_from_one_that_lets_nobody_in(
    postgres: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """MLflow tries both for a hundred seconds; the one may come back, the other is the user's to mend."""
    monkeypatch.setattr(connect, "PATIENCE_SECONDS", 0.5)
    closed = free_port("127.0.0.1")
    with (
        entered(Environment(mlflow_tracking_uri=f"postgresql+psycopg2://mlflow@127.0.0.1:{closed}/x")),
        pytest.raises(Unreachable, match="does not answer"),
    ):
        connect.check(tmp_path)
    with entered(Environment(mlflow_tracking_uri=postgres.replace("/postgres", "/nothing"))):
        with pytest.raises(ConfigError, match='database "nothing" does not exist'):
            connect.check(tmp_path)
        (problem,) = tracking_problems(tmp_path)
    assert not isinstance(problem, Away)
