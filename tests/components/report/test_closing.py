"""The end of a run on a cluster: jobs are cancelled, MLflow's run ends, the webhook is told; nothing of it can fail."""

from __future__ import annotations

import json
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nvila.components.contracts.environment import Environment
from nvila.components.contracts.exits import Exit
from nvila.components.contracts.results.run import Ending
from nvila.components.contracts.steps import STEPS
from nvila.components.report import close_run as closing
from nvila.components.report.close_run import close, notice
from nvila.components.report.ending import as_line, ending, in_log
from nvila.components.runner.status import Run
from nvila.components.tracking.connect import connected
from nvila.components.tracking.runs import record_step

MakeRun = Callable[..., Path]


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """What the site and the webhook are told, in order."""
    calls: list[tuple[Any, ...]] = []
    site = types.ModuleType("a_site")
    site.close = lambda run, here: calls.append(("close", run))  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "a_site", site)
    monkeypatch.setattr(closing, "post", lambda *arguments: calls.append(arguments))
    for name, value in (("NVILA_SITE", "a_site"), ("NVILA_RUN_ID", "id-1"), ("NVILA_WEBHOOK_URL", "https://h/x")):
        monkeypatch.setenv(name, value)
    return calls


def test_a_run_that_came_through(make_run: MakeRun, told: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Jobs are cancelled before anybody is told that the run is over."""
    run = make_run()
    monkeypatch.setenv("NVILA_RUN", str(run))
    monkeypatch.setenv("NVILA_WEBHOOK_SECRET", "s\n")  # a Secret made from a file ends like that
    close("SUCCEEDED", None, Environment.read())
    (first, (url, kind, data, secret)) = told
    assert first == ("close", run.name)
    assert (url, kind, secret) == ("https://h/x", "run.succeeded", "s")
    assert (data["outcome"], data["step"], data["recipe"]) == ("succeeded", None, "tiny")
    assert data["registered"] == {"name": "nvila-tiny", "version": "3"}
    shapes = data["accuracy"]["shapes"]
    assert shapes["quantized"]["value"] == pytest.approx(shapes["full"]["value"] - 0.01)
    assert (shapes["full"]["metric"], shapes["full"]["n"]) == ("accuracy", 1000)
    json.dumps(data)


@pytest.mark.parametrize(
    ("verdict", "outcome"), [("rejected", "rejected"), ("failed", "failed"), ("preempted", "stopped")]
)
def test_the_step_that_ended_it_is_named(make_run: MakeRun, verdict: str, outcome: str) -> None:
    """`The run failed` makes everybody open the run; and KFP knows no difference between a refusal and a fault."""
    run = Run.read(make_run(stop_at="train-4", verdict=verdict))
    ended = ending(run, "FAILED", "exit code 3")
    assert (ended.outcome, ended.step) == (outcome, "train-4")
    assert ended.message and "the gate says no" in ended.message


@pytest.mark.parametrize(
    ("state", "outcome"),
    [("CANCELLED", "stopped"), ("CANCELING", "stopped"), ("FAILED", "failed"), ("RUNNING", "failed"), ("", "failed")],
)
def test_a_step_that_was_killed_has_left_no_word(make_run: MakeRun, state: str, outcome: str) -> None:
    """Its file still says `running`: that is no success, whatever KFP has noticed so far."""
    run = make_run(stop_at="train-4", verdict="running")
    assert (ending(Run.read(run), state, None).outcome, ending(Run.read(run), state, None).step) == (outcome, "train-4")


@pytest.mark.parametrize("state", ["", None, "RUNNING", "SUCCEEDED"])
def test_a_run_that_was_ended_between_two_steps(make_run: MakeRun, state: Any) -> None:
    """Everything that began came through, so it was told as a success; the model was not even trained."""
    run, names = make_run(), [row.name for row in STEPS if not row.at_exit]
    assert ending(Run.read(run), state, None) == Ending(outcome="succeeded", exit_code=Exit.DONE)
    for name in reversed(names):
        (run / "steps" / f"{name}.json").unlink()
        ended = ending(Run.read(run), state, None)
        assert (ended.outcome, ended.step, ended.exit_code) == ("stopped", None, Exit.PREEMPTED)
        assert ended.message == f"the run was ended before {name} began"
        assert notice(run, Run.read(run), ended)["outcome"] == "stopped"


def test_every_branch_counts(make_run: MakeRun) -> None:
    """Branches run beside each other: that the last step of the list has ended is not enough."""
    run = make_run()
    for name in (row.name for row in STEPS if not row.at_exit):
        file = run / "steps" / f"{name}.json"
        file.rename(run / name)
        assert ending(Run.read(run), "", None).outcome == "stopped", name
        (run / name).rename(file)


def test_a_run_of_which_nothing_began(tmp_path: Path) -> None:
    """Terminated while `resolve` waited for a node: there is not even a folder."""
    assert ending(Run.read(tmp_path), "RUNNING", None).outcome == "stopped"


@pytest.mark.parametrize(("state", "outcome"), [("CANCELLED", "stopped"), ("FAILED", "failed"), ("RUNNING", "stopped")])
def test_a_step_that_waits_is_no_success(make_run: MakeRun, state: str, outcome: str) -> None:
    """A step whose pod waits for a node has no status file, whatever those beside it say."""
    run = make_run(stop_at="prune-image", verdict="cached")
    ended = ending(Run.read(run), state, None)
    assert (ended.outcome, ended.step) == (outcome, None)


def test_the_step_with_a_reason_is_named(make_run: MakeRun) -> None:
    """A pod that was moved waits for its next one; the branch beside it ends the run meanwhile."""
    run = make_run(stop_at="prune-video", verdict="failed")
    moved = json.loads((run / "steps" / "prune-image.json").read_text())
    (run / "steps" / "prune-image.json").write_text(json.dumps(moved | {"status": "preempted", "exit_code": 75}))
    ended = ending(Run.read(run), "FAILED", None)
    assert (ended.outcome, ended.step) == ("failed", "prune-video")


def test_a_report_that_fails_is_not_why_the_run_ended(make_run: MakeRun) -> None:
    """It comes last, and would hide the step that people have to look at."""
    run = make_run(stop_at="gate")
    record = {"name": "report", "status": "failed", "started": 1.0, "ended": 2.0, "exit_code": 1, "message": "no room"}
    (run / "steps" / "report.json").write_text(json.dumps(record))
    assert ending(Run.read(run), "FAILED", None).step == "gate"


@pytest.mark.parametrize("content", ["", "{", "[]", "null", "3"])
def test_a_damaged_status_file_is_no_success(make_run: MakeRun, content: str) -> None:
    """Closing a run reads what a lost node may have left."""
    run = make_run()
    (run / "steps" / "quantize.json").write_text(content)
    ended = ending(Run.read(run), "SUCCEEDED", None)
    assert (ended.outcome, ended.step) == ("failed", "quantize")


def test_a_run_whose_pods_never_started_has_failed(tmp_path: Path) -> None:
    """A wrong image name leaves no status file at all."""
    ended = ending(Run.read(tmp_path), "FAILED", "")
    assert (ended.outcome, ended.step) == ("failed", None) and "KFP" in (ended.message or "")


def test_secrets_do_not_leave(make_run: MakeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    """Messages quote what went wrong, and that may hold a password."""
    monkeypatch.setenv("HF_TOKEN", "hf_abcdefghijk")
    run = make_run(stop_at="initialize", text="s3://user:word@host hf_abcdefghijk")
    text = json.dumps(notice(run, Run.read(run), ending(Run.read(run), "FAILED", None)))
    assert "hf_abcdefghijk" not in text and "user:word" not in text


def test_one_thing_that_fails_does_not_keep_the_others(
    make_run: MakeRun, told: list[Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A cluster without an API server for a minute must not cost the message, nor fail the run."""
    monkeypatch.setenv("NVILA_RUN", str(make_run()))
    monkeypatch.setenv("NVILA_SITE", "nvila.no.such.site")
    close("SUCCEEDED", None, Environment.read())
    assert [kind for _, kind, *_ in told] == ["run.succeeded"]
    assert "jobs of this run may go on" in capsys.readouterr().err


def test_the_run_in_mlflow_ends(tracked_run: Path, told: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """It would stay `RUNNING` for ever."""
    record_step(tracked_run, "resolve", {}, {}, None, 1.0, 2.0, None, {})
    close("CANCELLED", None, Environment.read())
    parent = json.loads((tracked_run / "mlflow.json").read_text())
    with connected(tracked_run.parent) as client:
        assert client.get_run(parent["run_id"]).info.status == "KILLED"


def test_a_run_of_this_machine_is_left_alone(
    make_run: MakeRun, told: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """`nvila run` closes it itself, after its summary."""
    monkeypatch.setenv("NVILA_RUN", str(make_run()))
    monkeypatch.delenv("NVILA_RUN_ID")
    close("SUCCEEDED", None, Environment.read())
    assert told == []


@pytest.mark.parametrize("code", [Exit.USER, Exit.REJECTED, Exit.PREEMPTED, Exit.FAULT])
def test_the_exit_code_that_is_meant_stands_in_the_log(
    make_run: MakeRun, told: list[Any], code: Exit, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """KFP makes 1 of every code, and gives out nothing of a step but its log."""
    verdicts = {Exit.REJECTED: "rejected", Exit.PREEMPTED: "preempted"}
    run = make_run(stop_at="gate", verdict=verdicts.get(code, "failed"))
    file = run / "steps" / "gate.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"exit_code": code}))
    monkeypatch.setenv("NVILA_RUN", str(run))
    close("FAILED", None, Environment.read())
    found = in_log(f"I1128 10:00:00 launcher_v2.go:90] {capfd.readouterr().out}and more")
    assert found == ending(Run.read(run), "FAILED", None)
    assert (found.exit_code, found.step) == (code, "gate") and "the gate says no" in (found.message or "")


def test_the_newest_word_that_can_be_read_counts() -> None:
    """A log may hold a quotation of another run's line, or one that was cut off."""
    first, last = (Ending(outcome="failed", exit_code=code, message="a\nb") for code in (Exit.FAULT, Exit.USER))
    text = f"{as_line(first)}\n{as_line(last)}\n{as_line(first)[:-5]}\n"
    assert in_log(text) == last
    assert in_log("nothing of it") is None
