"""`nvila gc` removes what nothing needs, and nothing else, whatever goes on beside it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from nvila.components.contracts.environment import Environment
from nvila.components.contracts.errors import ConfigError, DamagedError, Unreachable
from nvila.components.contracts.manifest import InputRef, Manifest, describe_files
from nvila.components.contracts.modelrollout import Served
from nvila.components.contracts.modelrollout import Status as RolloutStatus
from nvila.components.contracts.store import MANIFEST, Store
from nvila.components.kube.rollouts import ModelRollout
from nvila.components.runner.status import Status, StepStatus
from nvila.components.serve import deployment
from nvila.components.tracking.connect import connected
from nvila.components.tracking.registry import challenge, lineage_tags, promote, register_version
from nvila.components.tracking.runs import open_step
from nvila.pipelines.cli import app
from nvila.pipelines.commands import collect, unneeded

OLD = time.time() - 100 * 86400


class Place:
    """A store and a folder of runs in which everything was used long ago."""

    def __init__(self, folder: Path) -> None:
        self.runs, self.store = folder / "runs", Store(folder / "store")

    def work(self, step: str, key: str, *inputs: Manifest) -> Manifest:
        """Finished work."""
        key = key.ljust(64, "0")
        with self.store.working(step, key) as out:
            (out / "file").write_text(key)
            refs = {m.step: InputRef(step=m.step, uri=f"{m.folder}/{MANIFEST}", digest=m.digest) for m in inputs}
            made = Manifest(step=step, key=key, kind="report", inputs=refs, files=describe_files(out))
            made = self.store.finish(out, made)
        self.age(made)
        return made

    def age(self, made: Manifest) -> None:
        os.utime(self.store.lock(made.step, made.key), (OLD, OLD))

    def version(self, made: Manifest) -> str:
        """A version of the model `m` that holds this work."""

        def log(client: Any) -> dict[str, Any]:
            run = open_step(client, self.runs / "r1", "register")
            logged = client.create_logged_model(run.info.experiment_id, name="m")
            return {"source": logged.artifact_location, "run_id": run.info.run_id, "model_id": logged.model_id}

        tags = lineage_tags({"model": made})
        return register_version(self.runs, "m", made.digest, log, description="", tags=tags).version

    def status(self, run: str, step: str, status: Status, made: Manifest | None = None) -> None:
        manifest = str(Path(made.folder, MANIFEST)) if made else None
        StepStatus(name=step, status=status, manifest=manifest).write(self.runs / run)
        os.utime(self.runs / run / "steps" / f"{step}.json", (OLD, OLD))

    @property
    def left(self) -> set[str]:
        return {path.parent.name[:1] for path in self.store.root.glob(f"*/*/{MANIFEST}")}

    def find(self, **how: Any) -> collect.Found:
        return collect.find(self.store, self.runs, how.get("days", 30), Environment(), [None])

    def take(self, found: collect.Found) -> collect.Found:
        return collect.take(found, self.find, self.store, self.runs)

    def found(self, **how: Any) -> set[str]:
        return {work.key[:1] for work in self.find(**how).work}


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    monkeypatch.setattr(collect, "configured", lambda *_: None)
    return Place(tmp_path)


def test_nothing_changes_until_it_is_told_to(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who looks what there is to free has not asked for it to go."""
    kept, old = place.work("base", "a"), place.work("base", "b")
    os.utime(place.store.lock(kept.step, kept.key))
    options = ["gc", "--json", "--runs", str(place.runs), "--store", str(place.store.root)]
    told = json.loads(CliRunner().invoke(app, options).stdout)
    assert not told["removed"] and [work["key"][:1] for work in told["work"]] == ["b"] and place.left == {"a", "b"}
    assert json.loads(CliRunner().invoke(app, [*options, "--remove"]).stdout) == told | {"removed": True}
    assert place.left == {"a"} and not Path(old.folder).exists()


def test_what_an_alias_names_stays_with_all_it_was_made_from(place: Place, empty_registry: None) -> None:
    """`nvila trace champion`, a rollback and a fine-tuning of the champion would find nothing."""
    base = place.work("base", "a")
    chain = [place.work("quantize", key, place.work("initialize", key, base)) for key in "bcde"]
    spare = place.work("initialize", "f")
    numbers = [place.version(made) for made in chain]
    promote(place.runs, "m", numbers[0])
    promote(place.runs, "m", numbers[1])  # and the first is `previous`
    challenge(place.runs, "m", numbers[2])
    assert place.found() == {"f"} and place.find().versions == ()  # a version that is new stays as well
    _age_versions(place)
    found = place.find()
    assert [version.version for version in found.versions] == [numbers[3]]
    assert place.found() == {"e", "f"}
    assert place.take(found).versions == found.versions
    assert place.left == {"a", "b", "c", "d"} and not Path(spare.folder).exists()
    assert place.find().versions == ()


def test_a_version_that_is_named_meanwhile_stays(place: Place, empty_registry: None) -> None:
    """Between looking and removing somebody asks for it."""
    number = place.version(place.work("quantize", "a"))
    _age_versions(place)
    found = place.find()
    challenge(place.runs, "m", number)
    assert [one.version for one in found.versions] == [number] and len(found.work) == 1
    assert place.take(found) == collect.Found((), ()) and place.left == {"a"}


def test_what_a_cluster_serves_stays(place: Place, empty_registry: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pod that starts again on another node fetches the version from the registry; it needs no alias for that."""
    number = place.version(place.work("quantize", "a"))
    _age_versions(place)
    served = Served(version=number, digest="d", since="2026-01-01T00:00:00Z")
    one = ModelRollout("m", 1, {"model": "m"}, RolloutStatus(model="m", leaving=[served]))
    monkeypatch.setattr(collect, "_rollouts", lambda *_: [one])
    assert place.find().versions == () and place.found() == set()


def test_a_shared_registry_without_a_cluster_keeps_its_versions(
    place: Place, empty_registry: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody here knows what the ModelRollouts of that registry use."""
    place.version(place.work("quantize", "a"))
    _age_versions(place)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{place.runs}/mlflow.db")
    found = place.find()
    assert found.versions == () and found.work == () and "no cluster is configured" in found.notes[0]


def test_what_a_run_that_goes_on_has_made_stays(place: Place) -> None:
    """Its next step would find its input gone, after days of training."""
    base, other = place.work("base", "a"), place.work("base", "b")
    at_work = place.work("train-1", "c")
    place.status("r1", "base", Status.DONE, base)
    place.status("r1", "train-1", Status.RUNNING)
    place.status("r2", "base", Status.DONE, other)
    with subprocess.Popen(_holding(place.store.lock("train-1", at_work.key)), stdout=subprocess.PIPE) as holder:
        assert holder.stdout and holder.stdout.readline()
        assert place.found() == {"b"}
        holder.kill()
    assert place.found() == {"a", "b", "c"}
    place.status("r1", "train-2", Status.WAITING)
    os.utime(place.runs / "r1" / "steps" / "train-2.json")  # between two steps nothing is locked
    assert place.found() == {"b", "c"}


def test_work_that_is_used_meanwhile_stays(place: Place) -> None:
    """A run that began after the look found the work done, and its next step would find it gone."""
    made = place.work("base", "a")
    found = place.find()
    with place.store.working("base", made.key):
        pass
    assert place.take(found).work == () and place.left == {"a"}


def test_what_is_served_here_stays(place: Place) -> None:
    """The server reads its folder again when it is started anew."""
    made = place.work("quantize", "a")
    version = deployment.Version(name="m", version="1", digest=made.digest, model_dir=f"{made.folder}/model")
    deployment.write(place.runs, deployment.Wanted(generation=1, host="127.0.0.1", port=1, champion=version))
    assert place.found() == set()


def test_a_removal_that_was_killed_is_done_again(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half a folder must neither be resumed as work of a step nor stay for ever."""
    made = place.work("base", "a")
    (Path(made.folder) / "file").unlink()  # what `Store.remove` has done before its end
    assert place.store.finished("base", made.key) is None
    assert place.found() == {"a"}
    place.take(place.find())
    assert place.left == set()


def test_a_store_whose_locks_do_not_hold_is_left_alone(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything in it would look as if nobody were at work."""
    place.work("base", "a")
    monkeypatch.setattr(unneeded, "lacking", lambda folder: True)
    with pytest.raises(ConfigError, match="no locks"):
        place.find()


def test_a_lineage_that_cannot_be_read_stops_it(place: Place, empty_registry: None) -> None:
    """What lies behind a damaged manifest would be removed, and with it the way to mend it."""
    made = place.work("quantize", "a", place.work("base", "b"))
    promote(place.runs, "m", place.version(made))
    Path(made.folder, MANIFEST).write_text("{")
    with pytest.raises(DamagedError, match="cannot be read"):
        place.find()


def test_a_registry_that_is_away_stops_it(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without it no version would seem to be needed."""
    place.work("base", "a")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setattr("nvila.components.tracking.connect.PATIENCE_SECONDS", 0.0)
    with pytest.raises(Unreachable):
        place.find()


@pytest.fixture
def empty_registry(place: Place, empty_mlflow: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The local one, whose tables take seconds to make."""
    for name in ("MLFLOW_REGISTRY_URI", "MLFLOW_RUN_ID", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)
    place.runs.mkdir()
    (place.runs / "mlflow.db").write_bytes(empty_mlflow.read_bytes())


def _age_versions(place: Place) -> None:
    """As if the versions had been registered long ago."""
    import sqlite3

    with connected(place.runs), sqlite3.connect(place.runs / "mlflow.db") as database:
        database.execute("update model_versions set creation_time = ?, last_updated_time = ?", (OLD * 1000, OLD * 1000))


def _holding(lock: Path) -> list[str]:
    program = (
        "import fcntl, sys, time\nfile = open(sys.argv[1], 'r+')\nfcntl.flock(file, fcntl.LOCK_EX)\n"
        "print(1, flush=True)\ntime.sleep(60)"
    )
    return [sys.executable, "-c", program, str(lock)]
