from __future__ import annotations

import json
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from nvila.components.contracts.manifest import File, Manifest, describe_files
from nvila.components.contracts.results.result import Other
from nvila.components.contracts.results.run import Resolution
from nvila.components.tracking.connect import connected
from nvila.components.tracking.runs import CURVE_POINTS, close_pipeline_run, record_step

SECRET = "hunter2-and-more"


def manifest(folder: Path, step: str = "train-1", **fields: Any) -> Manifest:
    folder.mkdir(parents=True, exist_ok=True)
    files = describe_files(folder)
    (folder / "manifest.json").write_text("{}")
    known = {"kind": "dataset"} | fields
    return Manifest(step=step, key="k" * 64, files=files, folder=str(folder), **known)


def record(run: Path, step: str = "train-1", **options: Any) -> None:
    fields: dict[str, Any] = {"settings": {}, "inputs": {}, "manifest": None, "error": None, "measured": {}} | options
    began = time.time() - 5
    record_step(run, step, began=began, ended=began + 3, **fields)


def children(run: Path) -> list[Any]:
    parent = json.loads((run / "mlflow.json").read_text())
    with connected(run.parent) as client:
        query = f"tags.`mlflow.parentRunId` = '{parent['run_id']}'"
        return client.search_runs([parent["experiment_id"]], query, order_by=["attributes.start_time"])


def test_step_becomes_a_child_with_everything_it_made(tracked_run: Path, tmp_path: Path) -> None:
    """What MLflow shows is what people compare runs by: parameters, metrics, curve, data and pictures must be there."""
    import mlflow

    folder = tmp_path / "store"
    (folder / "plots").mkdir(parents=True)
    (folder / "plots" / "loss.png").write_bytes(b"png")
    (folder / "weights.safetensors").write_bytes(b"big")
    rows = [json.dumps({"step": i, "loss": 3 - i}) for i in range(3)]
    noise = [
        '{"step": 7, "loss": null}',
        '{"step": null, "loss": 9}',
        '{"step": "x", "loss": 9}',
        "[2]",
        '{"step": 8, "lo',
    ]
    (folder / "loss.jsonl").write_text("\n".join([*rows, *noise]))
    attempt = {"began": 1.0, "startup_seconds": 1.0, "processes": 1, "device": "cpu"}
    reading = {"time": 7.5, "step": 2, "seconds": 2.0, "loss": 1.0, "lr": 0.1, "samples": 8, "tokens": 30, "places": 40}
    reading |= {"operations": 4e9, "waited_seconds": 0.5, "rss_bytes": 9}
    (folder / "meter.jsonl").write_text(f"{json.dumps(attempt)}\n{json.dumps(reading)}\n")
    source = File(uri="/data/digits/sft.json", size_bytes=3, sha256="a" * 64)
    told = Other(accuracy={"digits": 0.5}, informative=True)
    made = manifest(folder, "try", result=told, sources=[source])
    samples = manifest(tmp_path / "samples", "validate")
    settings = {"stage": {"name": "align", "data": {"digits.sft": 1}, "long": "x" * 900}}
    record(
        tracked_run, settings=settings, manifest=made, inputs={"samples": samples}, measured={"tokens_per_second": 9.0}
    )
    (child,) = children(tracked_run)
    assert child.info.status == "FINISHED"
    assert child.info.end_time - child.info.start_time == pytest.approx(3000, abs=1)
    assert child.data.params["stage.name"] == "align"
    assert child.data.params["stage.data.digits.sft"] == "1"
    assert len(child.data.params["stage.long"]) == 500
    numbers = {"accuracy/digits": 0.5, "tokens_per_second": 9.0, "curve/loss": 1.0, "curve/tokens_per_second": 15.0}
    numbers |= {"curve/samples_per_second": 4.0, "curve/operations_per_second": 2e9, "curve/loader_wait": 0.25}
    numbers |= {"curve/padding": 0.25, "curve/rss_bytes": 9.0}
    assert child.data.metrics == {f"train-1/{name}": value for name, value in numbers.items()}
    data = {d.dataset.name: d.dataset for d in child.inputs.dataset_inputs}
    assert data["validate"].digest == samples.digest[:36]
    places = {name: mlflow.data.get_source(dataset).uri for name, dataset in data.items()}
    assert places == {"validate": f"{samples.folder}/manifest.json", "digits": "/data/digits"}
    with connected(tracked_run.parent) as client:
        curve = client.get_metric_history(child.info.run_id, "train-1/curve/loss")
        (rate,) = client.get_metric_history(child.info.run_id, "train-1/curve/tokens_per_second")
        whole = Path(client.download_artifacts(child.info.run_id, "settings.json", str(tmp_path)))
        names = {f.path for f in client.list_artifacts(child.info.run_id)}
        pictures = {f.path for f in client.list_artifacts(child.info.run_id, "plots")}
    assert [(m.step, m.value) for m in curve] == [(0, 3.0), (1, 2.0), (2, 1.0)]
    assert (rate.step, rate.timestamp) == (2, 7500)
    assert json.loads(whole.read_text()) == settings
    assert names == {"manifest.json", "settings.json", "plots"} and pictures == {"plots/loss.png"}


def test_the_logged_manifest_holds_no_secret(tracked_run: Path, tmp_path: Path) -> None:
    """The manifest of `resolve` is the recipe; everybody who sees the tracking server may read its files."""
    folder = tmp_path / "store"
    told = Resolution(recipe={}, slices={"base": {"api_key": SECRET, "max_new_tokens": 8}})
    made = manifest(folder, "resolve", result=told, kind="slices")
    made.save(folder / "manifest.json")
    record(tracked_run, "resolve", manifest=made)
    (child,) = children(tracked_run)
    with connected(tracked_run.parent) as client:
        logged = Path(client.download_artifacts(child.info.run_id, "manifest.json", str(tmp_path))).read_text()
    assert json.loads(logged)["result"]["slices"] == {"base": {"api_key": "[redacted]", "max_new_tokens": 8}}
    assert json.loads(logged)["key"] == "k" * 64


def test_failed_step_is_a_failed_child_with_its_message(tracked_run: Path) -> None:
    """A run that failed must not look finished."""
    record(tracked_run, error="digits: exact match 0.3 is below 0.4")
    (child,) = children(tracked_run)
    assert child.info.status == "FAILED"
    assert child.data.tags["nvila.error"] == "digits: exact match 0.3 is below 0.4"


def test_no_secret_reaches_the_store(tracked_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tracking store is readable by the whole team, and its database file gets copied around."""
    monkeypatch.setenv("HF_TOKEN", SECRET)
    settings = {
        "api_key": SECRET,
        "nested": {"db": {"password": SECRET}, "url": f"postgresql://me:{SECRET}@host/db", "list": [{"token": SECRET}]},
        "note": f"use {SECRET}",
    }
    source = File(uri=f"s3://id:{SECRET}@bucket/data/sft.json", size_bytes=1, sha256="a" * 64)
    record(tracked_run, settings=settings, manifest=manifest(tmp_path / "store", sources=[source]))
    record(tracked_run, settings=settings, error=f"cannot read https://me:{SECRET}@host/x?token={SECRET}")
    assert len(children(tracked_run)) == 2
    files = [path for path in tracked_run.parent.rglob("*") if path.is_file()]
    assert any(path.name == "mlflow.db" for path in files)
    assert not [path for path in files if SECRET.encode() in path.read_bytes()]


def test_long_curve_is_thinned_and_keeps_its_ends(tracked_run: Path, tmp_path: Path) -> None:
    """A day of training must not take minutes to record; the last loss is the one people read."""
    folder = tmp_path / "store"
    folder.mkdir()
    (folder / "loss.jsonl").write_text("".join(json.dumps({"step": i, "loss": float(i)}) + "\n" for i in range(12_346)))
    record(tracked_run, manifest=manifest(folder))
    (child,) = children(tracked_run)
    with connected(tracked_run.parent) as client:
        steps = sorted(m.step for m in client.get_metric_history(child.info.run_id, "train-1/curve/loss"))
    assert len(steps) <= CURVE_POINTS + 1
    assert (steps[0], steps[-1]) == (0, 12_345)


def test_one_parent_for_all_steps_and_it_is_closed(tracked_run: Path) -> None:
    """Two parents for one run, or one that stays `running`, hide what belongs together."""
    recipe = {"name": "tiny", "train": {"lr": 0.1}}
    record(tracked_run, "resolve")  # it has failed once
    record(tracked_run, "validate", recipe=recipe)
    record(tracked_run, "initialize", recipe=recipe)
    (tracked_run / "summary.json").write_text(
        json.dumps({"accuracy": {"digits": {"bf16": 0.7}}, "decision": "promoted"})
    )
    (tracked_run / "report.html").write_text("<p>")
    close_pipeline_run(tracked_run, "FINISHED")
    assert [child.info.run_name for child in children(tracked_run)] == ["resolve", "validate", "initialize"]
    parent = json.loads((tracked_run / "mlflow.json").read_text())["run_id"]
    with connected(tracked_run.parent) as client:
        run = client.get_run(parent)
        names = {f.path for f in client.list_artifacts(parent)}
        kind = client.get_experiment(run.info.experiment_id).tags["mlflow.experimentKind"]
    assert run.info.status == "FINISHED"
    assert run.data.metrics == {"accuracy/digits/bf16": 0.7}
    assert run.data.params == {"name": "tiny", "train.lr": "0.1"}
    assert kind == "custom_model_development"  # the UI opens on an empty page else
    assert run.data.tags["mlflow.source.name"] == "nvila run" and run.data.tags["mlflow.user"]
    assert names == {"summary.json", "report.html"}


def test_run_of_the_environment_is_joined_and_left_open(tracked_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a cluster KFP owns the parent: a second parent would split the run, closing KFP's would end it early."""
    with connected(tracked_run.parent) as client:
        experiment = client.create_experiment("theirs")
        theirs = client.create_run(experiment).info.run_id
    monkeypatch.setenv("MLFLOW_RUN_ID", theirs)
    record(tracked_run, "validate")
    close_pipeline_run(tracked_run, "FINISHED")
    assert not (tracked_run / "mlflow.json").exists()
    with connected(tracked_run.parent) as client:
        (child,) = client.search_runs([experiment], f"tags.`mlflow.parentRunId` = '{theirs}'")
        assert client.get_run(theirs).info.status == "RUNNING"
    assert child.info.run_name == "validate"


def test_steps_that_end_together_are_all_recorded(tracked_run: Path) -> None:
    """sqlite takes one writer; branches of the DAG that end at once must wait for each other, not fail or race."""
    steps = [f"prune-{i}" for i in range(4)]
    threads = [threading.Thread(target=record, args=(tracked_run, step)) for step in steps]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(child.info.run_name for child in children(tracked_run)) == steps


def test_lost_tracking_store_gets_a_new_parent(tracked_run: Path, empty_mlflow: Path) -> None:
    """Somebody deletes mlflow.db between two attempts of a run: the second attempt must still be tracked."""
    record(tracked_run, "validate")
    (tracked_run.parent / "mlflow.db").write_bytes(empty_mlflow.read_bytes())
    record(tracked_run, "validate")
    assert len(children(tracked_run)) == 1
