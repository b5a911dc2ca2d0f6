"""A tracking store that several teams use, and what they do there."""

from __future__ import annotations

from pathlib import Path

import pytest

from nvila.components.contracts.environment import Environment, entered
from nvila.components.contracts.errors import ConfigError
from nvila.components.contracts.manifest import Manifest, describe_files
from nvila.components.tracking.connect import EXPERIMENT, KIND, KIND_TAG, connected
from nvila.components.tracking.named import registered
from nvila.components.tracking.registry import DIGEST_TAG, _ensure_model, find, lineage_tags, promote, register_version
from nvila.components.tracking.runs import close_pipeline_run, open_step, record_step


@pytest.fixture
def shared(tmp_path: Path, empty_mlflow: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the store of all teams, set as a user sets it."""
    (tmp_path / "shared.db").write_bytes(empty_mlflow.read_bytes())
    for name in ("MLFLOW_REGISTRY_URI", "MLFLOW_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/shared.db")
    return tmp_path


def team(root: Path, name: str) -> Path:
    """A team that has registered a model of this name and made it champion; its runs folder."""
    runs, folder = root / name / "runs", root / name / "store" / "quantize" / "k"
    (folder / "model").mkdir(parents=True)
    (folder / "model" / "config.json").write_text(name)
    made = Manifest(step="quantize", key="k" * 64, kind="model", files=describe_files(folder), folder=str(folder))
    made.save(folder / "manifest.json")

    def log(client):  # type: ignore[no-untyped-def]
        run = open_step(client, runs / "r1", "register")
        logged = client.create_logged_model(run.info.experiment_id, name=name)
        return {"source": logged.artifact_location, "run_id": run.info.run_id, "model_id": logged.model_id}

    tags = lineage_tags({"model": made})
    promote(runs, name, register_version(runs, name, made.digest, log, description="", tags=tags).version)
    return runs


def test_an_alias_never_means_another_teams_model(shared: Path) -> None:
    """The newest champion of all was served, whoever had made it."""
    ours = team(shared, "ours")
    with connected(ours) as client:
        client.create_registered_model("fraud-detector")
        client.create_model_version("fraud-detector", source="s3://b/x")
        client.set_registered_model_alias("fraud-detector", "champion", "1")
    assert [registered(name, ours).name for name in ("champion", "1", "ours@champion", "ours/1")] == ["ours"] * 4
    with pytest.raises(ConfigError, match="not registered by a run"):
        registered("fraud-detector@champion", ours)

    theirs = team(shared, "theirs")  # of this platform as well, and newer; its runs are called alike
    for name in ("champion", "1"):
        assert registered(name, ours).name == "ours" and registered(name, theirs).name == "theirs"
    with pytest.raises(ConfigError, match=r"Say which: theirs@champion, ours@champion\."):
        registered("champion", shared / "elsewhere")
    assert registered("ours@champion", shared / "elsewhere").name == "ours"


def test_a_model_is_found_beside_hundreds(shared: Path) -> None:
    """MLflow gives a hundred at a time."""
    ours = team(shared, "ours")
    with connected(ours) as client:
        for number in range(101):
            client.create_registered_model(f"m{number:03d}")
        for _ in range(101):
            client.create_model_version("ours", source="s3://b/x")
    assert registered("champion", ours).version == registered("1", ours).version == "1"
    digest = registered("champion", ours).tags["nvila.digest"]
    assert register_version(ours, "ours", digest, lambda client: {}, description="", tags={}).version == "1"
    assert find(ours, "ours", "9" * 5000) is None


def test_a_model_that_another_machine_registers_meanwhile_is_one_version(shared: Path) -> None:
    """Two versions of one digest: `rollout` of one run took the place of the other's, for the same model."""
    runs, digest = shared / "runs", "d" * 64

    def log(client):  # type: ignore[no-untyped-def]
        client.create_model_version("small", source="s3://b/x", tags={DIGEST_TAG: digest})
        run = open_step(client, runs / "r1", "register")
        logged = client.create_logged_model(run.info.experiment_id, name="small")
        return {"source": logged.artifact_location, "run_id": run.info.run_id, "model_id": logged.model_id}

    made = register_version(runs, "small", digest, log, description="", tags={})
    assert (made.version, made.aliases) == ("1", ())
    with connected(runs) as client:
        assert [v.version for v in client.search_model_versions("name = 'small'")] == [1]
        client.search_registered_models = lambda **_: []  # as it was a moment ago
        _ensure_model(client, "small")


def test_what_somebody_has_deleted_does_not_end_a_run(tracked_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A deleted experiment keeps its name and takes no run: no step was recorded any more, and `register` failed."""
    record_step(tracked_run, "resolve", {}, {}, None, 0.0, 1.0, "no", {})
    with connected(tracked_run.parent) as client:
        experiment = client.get_experiment_by_name(EXPERIMENT)
        client.delete_experiment(experiment.experiment_id)
    record_step(tracked_run, "validate", {}, {}, None, 0.0, 1.0, "no", {})
    assert capsys.readouterr().err.count("it is restored") == 1
    with connected(tracked_run.parent) as client:
        assert client.get_experiment(experiment.experiment_id).tags[KIND_TAG] == KIND
        steps = client.search_runs([experiment.experiment_id], "tags.`nvila.step` != ''")
        assert {run.data.tags["nvila.step"] for run in steps} == {"resolve", "validate"}
        client.delete_run(steps[0].data.tags["mlflow.parentRunId"])
    record_step(tracked_run, "gate", {}, {}, None, 0.0, 1.0, "no", {})
    close_pipeline_run(tracked_run, "FAILED")
    with connected(tracked_run.parent) as client:
        (parent,) = client.search_runs([experiment.experiment_id], "attributes.run_name = 'r1'")
    assert parent.info.status == "FAILED"


def test_a_record_is_made_up_for_when_mlflow_is_back(tracked_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An hour without MLflow left an hour's steps out of it for good, and each step waited for it anew."""
    from nvila.components.serve.ports import free_port
    from nvila.components.tracking import connect

    folder = tracked_run.parents[1] / "store" / "validate" / "k"
    folder.mkdir(parents=True)
    made = Manifest(step="validate", key="k" * 64, kind="report", folder=str(folder))
    made.save(folder / "manifest.json")
    monkeypatch.setattr(connect, "PATIENCE_SECONDS", 0.2)
    away = Environment(mlflow_tracking_uri=f"http://127.0.0.1:{free_port('127.0.0.1')}")
    for step, manifest in (("validate", made), ("gate", None)):
        with entered(away), pytest.raises(connect.Unreachable):
            error = None if manifest else "below"
            record_step(tracked_run, step, {"lr": 1}, {"samples": made}, manifest, 5.0, 6.0, error, {"n": 3.0})
    close_pipeline_run(tracked_run, "FINISHED")
    with connected(tracked_run.parent) as client:
        experiment = client.get_experiment_by_name(EXPERIMENT)
        found = client.search_runs([experiment.experiment_id], order_by=["attributes.run_name"])
    assert [(run.info.run_name, run.info.status) for run in found] == [
        ("gate", "FAILED"),
        ("r1", "FINISHED"),
        ("validate", "FINISHED"),
    ]
    assert found[2].data.params == {"lr": "1"} and found[2].data.metrics == {"validate/n": 3.0}
    assert found[2].data.tags["nvila.digest"] == found[0].data.tags["nvila.input.samples"] == made.digest
    assert not any((tracked_run / "untracked").iterdir())
