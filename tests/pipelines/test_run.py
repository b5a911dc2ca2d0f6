"""The micro recipe through the real DAG: first run, second run, a rejected one, a stopped one. No vLLM, no server."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from nvila.components.contracts.exits import Exit
from nvila.components.contracts.steps import ROWS

pytestmark = pytest.mark.slow

NEVER_SKIPPED = {"register", "rollout", "report"}
TIMEOUT_SECONDS = 600
FOLDER = "-a b%20c%2F?#&;='\"$HOME{}[x]*\\täst 日本\nn:x"
"""Nothing of it may mean anything to SQLite, MLflow, KFP, a shell or a template."""
REJECTING = "evaluate.gate.min_accuracy={digits: 1.0}"


def _command(*overrides: str) -> list[str]:
    options = [part for override in overrides for part in ("--override", override)]
    return [sys.executable, "-m", "nvila.pipelines.cli", "run", "micro", *options]


def _run(folder: Path, *overrides: str) -> tuple[int, dict[str, Any], str]:
    """Exit code, summary and terminal output of one run in `folder`."""
    ended = subprocess.run(_command(*overrides), cwd=folder, capture_output=True, text=True, timeout=TIMEOUT_SECONDS)
    return ended.returncode, json.loads((folder / "runs/latest/summary.json").read_text()), ended.stdout


def _status(summary: dict[str, Any]) -> dict[str, str]:
    return {step["name"]: step["status"] for step in summary["steps"]}


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int, dict[str, Any], str]:
    """The first run in a new folder, whose name is no easy one."""
    folder = tmp_path_factory.mktemp("micro") / FOLDER
    folder.mkdir()
    code, summary, output = _run(folder)
    log = (folder / "runs/latest/log.txt").read_text()
    assert code == 0, output + log[-5000:]
    return folder, code, summary, output


def test_the_whole_lifecycle_comes_through(first: tuple[Path, int, dict[str, Any], str]) -> None:
    """Every step, its output and the links between them, with real data and the real runner."""
    folder, _, summary, output = first
    assert set(_status(summary).values()) == {"done"} and list(_status(summary)) == list(ROWS)
    assert set(summary["accuracy"]) == {"shapes", "digits", "clips"}
    assert set(summary["stages"]) == {"initialize", *(f"train-{stage}" for stage in range(1, 6))}
    assert summary["peak_pss_bytes"] > 2**27 and 0 < summary["seconds_overhead"] < summary["seconds_total"]
    page = folder / "runs/latest/report.html"
    assert page.stat().st_size > 10_000 and "report.html" in output
    artifacts = list((folder / "runs/latest/kfp").rglob("report/report"))
    assert len(artifacts) == 1 and artifacts[0].read_bytes() == page.read_bytes()


def test_the_ui_gets_numbers_and_texts_that_it_can_show(first: tuple[Path, int, dict[str, Any], str]) -> None:
    """The UI shows metadata of metrics and the very file of an HTML or Markdown artifact, and nothing else."""
    folder, _, summary, _ = first
    tasks = next((folder / "runs/latest/kfp").iterdir())

    def metadata(step: str) -> dict[str, Any]:
        output = json.loads((tasks / step / "executor_output.json").read_text())
        return dict(output["artifacts"][ROWS[step].output]["artifacts"][0]["metadata"])

    measured = metadata("evaluate")
    assert {s: measured[f"accuracy/{s}/accuracy"] for s in summary["accuracy"]} == {
        source: row["full"]["value"] for source, row in summary["accuracy"].items()
    }
    assert "accuracy/digits/accuracy" in metadata("evaluate-quantized") and "kept" not in str(metadata("prune-image"))
    assert "Expectations on" in (tasks / "validate" / "data_docs").read_text()
    assert (tasks / "register" / "card").read_text().startswith("# nvila-micro\n")


def test_an_unchanged_second_run_repeats_nothing(first: tuple[Path, int, dict[str, Any], str]) -> None:
    """A key that holds a time, a path of the run or an unstable result would train everything anew."""
    code, summary, _ = _run(first[0])
    assert code == 0
    repeated = {name for name, status in _status(summary).items() if status != "cached"}
    assert repeated == NEVER_SKIPPED
    assert summary["accuracy"] == first[2]["accuracy"]


def test_the_plan_of_an_unchanged_run_hits_everything(first: tuple[Path, int, dict[str, Any], str]) -> None:
    """The plan's keys must be those of the run, or it promises work that is not done, or the other way about."""
    command = [sys.executable, "-m", "nvila.pipelines.cli", "plan", "micro", "--no-cluster", "--json"]
    plan = json.loads(subprocess.run(command, cwd=first[0], capture_output=True, check=True, timeout=300).stdout)
    assert plan["store"] == {name: "always" if name in NEVER_SKIPPED else "hit" for name in ROWS}
    assert all(stage["samples"] and stage["hours"] == 0 for stage in plan["stages"])


def test_a_changed_evaluation_repeats_nothing_before_it(first: tuple[Path, int, dict[str, Any], str]) -> None:
    """The evaluation's settings must not leak into the slices of training."""
    code, summary, _ = _run(first[0], "evaluate.limit=16")
    assert code == 0
    before = list(ROWS)[list(ROWS).index("validate") : list(ROWS).index("evaluate")]
    status = _status(summary)
    assert {name: status[name] for name in before} == dict.fromkeys(before, "cached")
    assert status["evaluate"] == "done" and status["quantize"] == "cached"


def test_a_rejected_model_ends_with_3_and_a_report(first: tuple[Path, int, dict[str, Any], str]) -> None:
    """Nothing after the gate may run, and the report must say why."""
    code, summary, output = _run(first[0], REJECTING)
    status = _status(summary)
    assert code == Exit.REJECTED and summary["decision"] == "rejected"
    assert (status["gate"], status["quantize"], status["register"]) == ("rejected", "waiting", "waiting")
    assert status["report"] == "done" and (first[0] / "runs/latest/report.html").is_file()
    assert "gate rejected" in output


@pytest.mark.turns(3, 1)
def test_a_stopped_run_ends_with_75_leaves_nothing_and_resumes(
    first: tuple[Path, int, dict[str, Any], str],
) -> None:
    """SIGTERM must reach the training processes under torchrun, and the same command must go on from there."""
    folder = first[0]
    longer = ("train.stages.4.data={clips.sft: 20}", "train.checkpoint_seconds=1", REJECTING)
    run = subprocess.Popen(_command(*longer), cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    newest = _wait_for_training(folder, run)
    children = psutil.Process(run.pid).children(recursive=True)
    run.send_signal(signal.SIGTERM)
    assert run.wait(timeout=90) == Exit.PREEMPTED
    _, alive = psutil.wait_procs(children, timeout=5)
    assert alive == []
    assert json.loads((newest / "steps/train-5.json").read_text())["status"] == "preempted"
    assert json.loads((newest / "summary.json").read_text())["decision"] == "preempted"
    code, summary, output = _run(folder, *longer)
    assert code == Exit.REJECTED, output  # the gate saves the time of what comes after it
    assert _status(summary)["train-4"] == "cached" and _status(summary)["train-5"] == "done"


def _wait_for_training(folder: Path, run: subprocess.Popen[bytes]) -> Path:
    """The new run's folder, once stage 5 has made a few steps."""
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline and run.poll() is None:
        newest = max((p for p in (folder / "runs").glob("2*") if p.is_dir()), key=os.path.getmtime)
        progress = newest / "progress" / "train-5.json"
        if not (newest / "summary.json").exists() and progress.is_file():
            done = json.loads(progress.read_text())["done"]
            if done and done > 1:
                return newest
        time.sleep(0.2)
    raise AssertionError(f"training was not reached; exit code {run.poll()}")
