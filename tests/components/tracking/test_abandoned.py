"""Runs that were killed outright, as the tracking store shows them afterwards; a real store."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path

import pytest

from nvila.components.contracts.processes import OWNER, Process
from nvila.components.tracking.abandoned import close_abandoned
from nvila.components.tracking.connect import connected
from nvila.components.tracking.runs import PROCESS_TAG, _run_tags, close_pipeline_run, record_step


def left_open(run: Path) -> str:
    """A run that has recorded one step and is in the middle of recording another; the id of its parent."""
    run.mkdir(exist_ok=True)
    record_step(run, "resolve", {}, {}, None, 1.0, 2.0, None, {})
    parent = str(json.loads((run / "mlflow.json").read_text())["run_id"])
    with connected(run.parent) as client:
        experiment = client.get_run(parent).info.experiment_id
        client.create_run(experiment, tags={"mlflow.parentRunId": parent} | _run_tags(run))
    return parent


def statuses(runs: Path) -> dict[str, set[str]]:
    """By the name of the pipeline run."""
    found: dict[str, set[str]] = {}
    with connected(runs) as client:
        experiment = client.get_experiment_by_name("nvila").experiment_id
        for run in client.search_runs([experiment]):
            found.setdefault(run.data.tags["nvila.run"], set()).add(run.info.status)
    return found


def test_runs_that_were_killed_are_closed_by_the_next(tracked_run: Path) -> None:
    """Killed by SIGKILL nobody ends the run in MLflow: it was `RUNNING` for ever."""
    runs = tracked_run.parent
    died = time.time() + 5
    parents = {name: left_open(runs / name) for name in ("dead", "alive", "moved", "over")}
    (runs / "moved" / "mlflow.json").write_text(json.dumps({"run_id": "another"}))
    close_pipeline_run(runs / "over", "FINISHED")
    left_open(tracked_run)
    (tracked_run / "mlflow.json").write_text("{")
    before = statuses(runs)
    assert before["dead"] == {"FAILED", "RUNNING"}
    close_abandoned(runs, lambda folder: None if folder.name == "alive" else died)
    changed = {name: after for name, after in statuses(runs).items() if after != before[name]}
    assert changed == {"dead": {"FAILED", "KILLED"}, "over": {"FAILED", "FINISHED", "KILLED"}}
    with connected(runs) as client:
        assert client.get_run(parents["dead"]).info.end_time == int(died * 1000)
        assert client.get_run(parents["over"]).info.status == "FINISHED"


def test_a_run_of_another_folder_is_closed_where_its_process_has_ended(tracked_run: Path) -> None:
    """Its folder was removed, or a server holds the runs of several: nobody else would end it; one that lives, or is of
    another machine, is not ours to end."""
    runs, me = tracked_run.parent, Process.this()
    owners = {
        "dead": me.model_copy(update={"born": me.born - 1}),
        "rebooted": me.model_copy(update={"boot": "before"}),
        "alive": me,
        "elsewhere": me.model_copy(update={"host": "another", "born": me.born - 1}),
    }
    for name, owner in owners.items():
        (runs / name).mkdir()
        (runs / name / OWNER).write_text(owner.model_dump_json())
        left_open(runs / name)
        shutil.rmtree(runs / name)
    left_open(runs / "unknown")
    shutil.rmtree(runs / "unknown")
    close_abandoned(runs, lambda folder: pytest.fail("no such folder"))
    still = {name for name, seen in statuses(runs).items() if "RUNNING" in seen}
    assert still == {"alive", "elsewhere", "unknown"}
    with connected(runs) as client:
        experiment = client.get_experiment_by_name("nvila").experiment_id
        assert not any("pytest" in run.data.tags.get(PROCESS_TAG, "") for run in client.search_runs([experiment]))


@pytest.mark.parametrize("name", ["..", "../runs/dead", "/", "none"])
def test_names_from_the_store_are_no_paths(tracked_run: Path, name: str) -> None:
    """A shared tracking server holds what others have written."""
    runs = tracked_run.parent
    parent = left_open(runs / "dead")
    with connected(runs) as client:
        client.set_tag(parent, "nvila.run", name)
    asked: list[str] = []
    close_abandoned(runs, lambda folder: asked.append(folder.name))
    assert set(asked) <= {"dead"}  # by its step
    with connected(runs) as client:
        assert client.get_run(parent).info.status == "RUNNING"


def test_without_a_store_none_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Making one takes seconds."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    close_abandoned(tmp_path, lambda folder: 1.0)
    assert list(tmp_path.iterdir()) == []
