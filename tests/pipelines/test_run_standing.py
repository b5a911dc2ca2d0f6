"""`nvila status RUN`, `nvila logs RUN STEP` and what a run on Kubeflow ended with, against a server over HTTP."""

from __future__ import annotations

import json
import os
import re
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from kfp_stand_in import STARTED, TOKEN, StandIn, standing_in
from typer.testing import CliRunner

from nvila.components.contracts.environment import Environment
from nvila.components.contracts.errors import ConfigError, NvilaError
from nvila.components.contracts.exits import Exit
from nvila.components.contracts.pipelines import PIPELINES
from nvila.components.contracts.processes import OWNER, Process
from nvila.components.contracts.results.run import Ending
from nvila.components.report.ending import as_line
from nvila.components.runner.status import Run, Status, StepStatus
from nvila.pipelines.cli import app
from nvila.pipelines.compile.package import resource_name
from nvila.pipelines.kubeflow import connection, run
from nvila.pipelines.kubeflow.connection import Connection, ServerDown
from nvila.pipelines.kubeflow.server import Server
from nvila.pipelines.show import standing
from nvila.pipelines.show.summary import LOG, write_summary

ENDED = {
    Exit.USER: Ending(outcome="failed", exit_code=Exit.USER, step="validate", message="s.json:3: no image"),
    Exit.REJECTED: Ending(outcome="rejected", exit_code=Exit.REJECTED, step="gate", message="accuracy 0.31 < 0.40"),
    Exit.PREEMPTED: Ending(outcome="stopped", exit_code=Exit.PREEMPTED, step="train-4", message="asked to stop"),
    Exit.FAULT: Ending(outcome="failed", exit_code=Exit.FAULT, step="train-1", message="the loss is not finite"),
}


@pytest.fixture
def kfp(monkeypatch: pytest.MonkeyPatch) -> Iterator[StandIn]:
    """A server with one run, `r0`, of which the pipeline's steps have nodes of their names."""
    for name in ("KF_PIPELINES_TOKEN", "KF_PIPELINES_SA_TOKEN_PATH", "KF_PIPELINES_ENDPOINT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(run, "POLL_SECONDS", 0.01)
    monkeypatch.setattr(standing, "_LOOK_SECONDS", 0.01)
    with standing_in() as stand_in:
        stand_in.install(resource_name("lifecycle"))
        stand_in.runs = [{"run_id": "r0", "display_name": "mine", "created_at": STARTED}]
        yield stand_in


def _task(step: str, state: str, **fields: Any) -> dict[str, Any]:
    node = {"child_tasks": [{"pod_name": f"lifecycle-x-{step}"}]}
    task = {"run_id": "r0", "task_id": step, "display_name": step, "state": state, "create_time": STARTED}
    return task | {"start_time": STARTED, "end_time": "2026-11-22T10:05:00Z"} | node | fields


def _failed_at(step: str) -> dict[str, Any]:
    tasks = [_task("resolve", "SUCCEEDED"), _task(step, "FAILED"), _task("report", "SUCCEEDED")]
    return {"state": "FAILED", "run_details": {"task_details": tasks}}


def nvila(*arguments: str) -> tuple[int, str]:
    """Exit code, and all that is said, in one line; with --json what programs read."""
    ended = CliRunner().invoke(app, list(arguments))
    if isinstance(ended.exception, NvilaError):
        return int(ended.exception.exit_code), f"{ended.output} {ended.exception}"
    assert ended.exception is None or isinstance(ended.exception, SystemExit), ended.exception
    return ended.exit_code, " ".join((ended.stdout if "--json" in arguments else ended.output).split())


@pytest.mark.parametrize("code", ENDED)
def test_the_exit_code_that_is_meant_reaches_the_terminal(kfp: StandIn, code: Exit) -> None:
    """KFP makes 1 of every code: a script retried a refusal, and nobody saw why a run had failed."""
    ended = ENDED[code]
    kfp.script = [_failed_at(str(ended.step))]
    kfp.logs["lifecycle-x-report"] = f"I1122 main.go:77] started\n{as_line(ended)}\nI1122 main.go:99] uploading\n"
    for arguments in (("status", "r0"), ("status", "r0", "--wait"), ("submit", "micro", "--wait")):
        found, said = nvila(*arguments, "--host", kfp.url)
        assert found == code, said
        assert f"{ended.outcome} (exit code {int(code)}): {ended.step}: {ended.message}" in said
        assert "/#/runs/details/r" in said
    found, said = nvila("status", "r0", "--host", kfp.url, "--json")
    told = json.loads(said)
    assert (found, told["exit_code"], told["failed_step"]) == (code, code, ended.step)
    assert (told["state"], told["message"]) == (ended.outcome, ended.message)
    (step,) = (step for step in told["steps"] if step["name"] == ended.step)
    assert step["note"] == ended.message and step["status"] != "done"


def test_a_run_that_goes_on_is_no_fault(kfp: StandIn) -> None:
    """A script that asks how it stands must not take it for an end."""
    now = [_task("resolve", "SUCCEEDED"), _task("preflight", "RUNNING", end_time=None)]
    kfp.script = [{"state": "RUNNING", "run_details": {"task_details": now}}]
    code, said = nvila("status", "r0", "--host", kfp.url, "--json")
    told = json.loads(said)
    assert (code, told["state"], told["exit_code"]) == (0, "running", None)
    assert {step["name"]: step["status"] for step in told["steps"]}["preflight"] == "running"


def test_the_table_is_that_of_the_runs_pipeline(kfp: StandIn) -> None:
    """A run that fine-tunes has no pruning to wait for."""
    tuning = PIPELINES["finetune"]
    kfp.runs[0]["runtime_config"] = {"parameters": dict(tuning.form)}
    kfp.script = [{"state": "RUNNING"}]
    told = json.loads(nvila("status", "r0", "--host", kfp.url, "--json")[1])
    assert [step["name"] for step in told["steps"]] == list(tuning.rows)


def test_a_cancelled_run_is_75(kfp: StandIn) -> None:
    """It resumes; and there is often no report of it, as its pod was ended with the others."""
    tasks = [_task("train-4", "FAILED"), _task("report", "SUCCEEDED")]
    kfp.script = [{"state": "CANCELED", "run_details": {"task_details": tasks}}]
    code, said = nvila("status", "r0", "--host", kfp.url)
    assert code == Exit.PREEMPTED and "stopped (exit code 75): the run was cancelled" in said
    kfp.logs["lifecycle-x-report"] = as_line(ENDED[Exit.PREEMPTED])
    assert "(exit code 75): train-4: the run was cancelled" in nvila("status", "r0", "--host", kfp.url)[1]


@pytest.mark.parametrize("log", [None, "", "nvila run ended: {}", as_line(Ending(outcome="succeeded", exit_code=0))])
def test_without_a_verdict_it_is_a_fault(kfp: StandIn, log: str | None) -> None:
    """A report that was lost, or that came through before the run failed, makes no success of it."""
    kfp.script = [_failed_at("gate")]
    kfp.logs |= {} if log is None else {"lifecycle-x-report": log}
    code, said = nvila("status", "r0", "--host", kfp.url)
    assert code == Exit.FAULT and "failed (exit code 1): gate: Kubeflow gives no reason" in said


def test_a_run_that_is_gone_is_told(kfp: StandIn) -> None:
    """It was deleted in the UI, or the id is another server's."""
    for arguments in (("status", "r7"), ("status", "r7", "--wait"), ("logs", "r7", "gate")):
        code, said = nvila(*arguments, "--host", kfp.url)
        assert code == Exit.USER and "there is no such run (got 'r7')" in said


def test_the_log_of_a_step(kfp: StandIn) -> None:
    """What a step said last is why it failed; secrets in it stay where they are."""
    running = [_task("gate", "FAILED"), _task("train-1", "RUNNING"), _task("resolve", "SUCCEEDED")]
    kfp.script = [{"state": "RUNNING", "run_details": {"task_details": running}}]
    kfp.logs["lifecycle-x-gate"] = "accuracy 0.31\ns3://me:word@host/b\n"
    code, said = nvila("logs", "r0", "gate", "--host", kfp.url)
    assert code == 0 and "accuracy 0.31" in said and "me:word" not in said
    for step, words in (
        ("gates", "no such step"),
        ("rollout", "has not begun"),
        ("train-1", r"running; .*kubectl logs -l pipeline/runid=r0"),
        ("resolve", "archiveLogs"),
    ):
        code, said = nvila("logs", "r0", step, "--host", kfp.url)
        assert code == Exit.USER and re.search(words, said), said


@pytest.mark.parametrize("arguments", [("status", "r0"), ("logs", "r0", "gate"), ("submit", "micro")])
def test_who_is_not_let_in_is_told(kfp: StandIn, arguments: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """401 and 403 are no faults that a retry mends; and no answer shows the token."""
    monkeypatch.setenv("KF_PIPELINES_TOKEN", TOKEN)
    kfp.script = [_failed_at("gate")]
    for status, words in ((401, "does not accept the token"), (403, "not allowed: injected")):
        kfp.failing = [("GET", "healthz|runs", status)]
        code, said = nvila(*arguments, "--host", kfp.url)
        assert code == Exit.USER and words in said and TOKEN not in said


@pytest.mark.parametrize("arguments", [("status", "r0"), ("logs", "r0", "gate"), ("submit", "micro")])
def test_a_host_that_is_away_or_hangs_ends_with_2(
    kfp: StandIn, arguments: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A job of CI hung for five minutes at a server behind a firewall, and ended with the code of a fault."""
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))  # and does not listen
        code, said = nvila(*arguments, "--host", f"http://127.0.0.1:{nobody.getsockname()[1]}")
    assert code == Exit.USER and "no answer" in said and "can this machine reach it?" in said
    monkeypatch.setattr(connection, "TIMEOUT_SECONDS", (1.0, 0.1))
    kfp.hangs_seconds = 1.0
    code, said = nvila(*arguments, "--host", kfp.url)
    assert code == Exit.USER and "no answer: " in said and "timed out" in said
    assert kfp.runs == kfp.runs[:1]


def test_who_waits_is_told_that_the_run_goes_on(kfp: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that stays away for half an hour says nothing about the run: 2 or 1 would have it submitted again."""
    monkeypatch.setattr(run, "PATIENCE_SECONDS", 0.2)
    kfp.failing = [("GET", "runs/r0", 503)] * 100
    code, said = nvila("status", "r0", "--host", kfp.url, "--wait")
    assert code == Exit.PREEMPTED and "answers 503" in said and "The run goes on" in said


def test_ctrl_c_says_how_to_go_on(kfp: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    """The id was lost with the terminal's lines; and a script's Ctrl-C must not cancel training."""
    kfp.script = [{"state": "RUNNING"}]
    interrupted = iter([None, None])

    def sleep(seconds: float) -> None:
        if next(interrupted, "c"):
            raise KeyboardInterrupt

    monkeypatch.setattr(standing, "time", SimpleNamespace(sleep=sleep))
    code, said = nvila("submit", "micro", "--host", kfp.url, "--wait")
    assert code == Exit.PREEMPTED and not kfp.terminated
    assert f"`nvila status r1 --host {kfp.url} --wait` goes on waiting" in said


def test_a_proxy_is_asked(kfp: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    """From a company's network nothing else leads out; its login goes to it alone, and is not shown."""
    kfp.script = [_failed_at("gate")]
    monkeypatch.setenv("http_proxy", "")
    monkeypatch.delenv("http_proxy")
    monkeypatch.setenv("HTTP_PROXY", kfp.url.replace("//", "//ada:pass%20word@"))
    assert nvila("status", "r0", "--host", "http://kubeflow.example")[0] == Exit.FAULT
    assert set(kfp.proxied) == {"kubeflow.example"}
    monkeypatch.setenv("NO_PROXY", "10.0.0.0/8,.example")
    monkeypatch.setenv("no_proxy", "10.0.0.0/8,.example")
    kfp.proxied.clear()
    with pytest.raises(ServerDown, match=r"no answer.*can this machine reach it"):
        Server(Connection("http://kubeflow.example", Environment.read())).run("r0")
    assert kfp.proxied == []


def test_a_proxy_that_is_away_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """The URL of the server was blamed; and the message held the proxy's password."""
    monkeypatch.delenv("https_proxy", raising=False)
    monkeypatch.setenv("HTTPS_PROXY", "http://ada:word@127.0.0.1:9")
    with pytest.raises(ServerDown, match=r"through the proxy http://127.0.0.1:9; NO_PROXY") as caught:
        Server(Connection("https://kubeflow.example", Environment.read())).run("r0")
    assert "word" not in str(caught.value)
    monkeypatch.setenv("HTTPS_PROXY", "socks5://ada:word@127.0.0.1:9")
    with pytest.raises(ConfigError, match=r"HTTPS_PROXY: not a URL of an HTTP proxy") as caught_too:
        Connection("https://kubeflow.example", Environment.read())
    assert "word" not in str(caught_too.value)


def test_a_tunnel_carries_no_token(monkeypatch: pytest.MonkeyPatch) -> None:
    """To an https host a proxy opens a tunnel: it gets its own login, and nothing of ours."""
    asked: list[bytes] = []
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            while True:
                try:
                    client, _ = listener.accept()
                except OSError:
                    return
                with client:
                    asked.append(client.recv(4096))
                    client.sendall(b"HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\n\r\n")

        threading.Thread(target=serve, daemon=True).start()
        monkeypatch.delenv("https_proxy", raising=False)
        monkeypatch.setenv("HTTPS_PROXY", f"http://ada:word@127.0.0.1:{listener.getsockname()[1]}")
        monkeypatch.setenv("KF_PIPELINES_TOKEN", TOKEN)
        with pytest.raises(ServerDown, match=r"403.*through the proxy"):
            Server(Connection("https://kubeflow.example", Environment.read())).run("r0")
        listener.shutdown(socket.SHUT_RDWR)
    assert asked[0].startswith(b"CONNECT kubeflow.example:443") and b"proxy-authorization: basic" in asked[0].lower()
    assert TOKEN.encode() not in b"".join(asked)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a run of this machine: one step has come through, the next one works."""
    monkeypatch.delenv("KF_PIPELINES_ENDPOINT", raising=False)
    folder = tmp_path / "runs" / "20261128T100000Z-micro"
    (folder / "steps").mkdir(parents=True)
    (folder / "arguments.json").write_text("{}")
    (folder / OWNER).write_text(Process.this().model_dump_json())
    (folder.parent / "latest").symlink_to(folder.name)
    StepStatus(name="resolve", status=Status.DONE, started=1.0, ended=2.0, exit_code=Exit.DONE).write(folder)
    StepStatus(name="preflight", status=Status.RUNNING, started=2.0, pid=os.getpid()).write(folder)
    return folder


def _status(folder: Path, *more: str) -> tuple[int, dict[str, Any]]:
    code, said = nvila("status", "latest", "--runs", str(folder.parent), "--json", *more)
    return code, json.loads(said)


def test_the_same_command_tells_of_this_machine(here: Path) -> None:
    """One command for both: whoever learns the one knows the other."""
    code, told = _status(here)
    assert (code, told["state"], told["exit_code"], told["run"]) == (0, "running", None, here.name)
    steps = {step["name"]: step["status"] for step in told["steps"]}
    assert (steps["resolve"], steps["preflight"], steps["validate"]) == ("done", "running", "waiting")
    refused = StepStatus(name="preflight", status=Status.REJECTED, started=2.0, ended=3.0, exit_code=Exit.REJECTED)
    refused.model_copy(update={"message": "the gate says no"}).write(here)
    write_summary(Run.read(here), 3.0, 1, Exit.REJECTED)
    for more in ((), ("--wait",)):
        code, told = _status(here, *more)
        assert (code, told["state"], told["failed_step"]) == (Exit.REJECTED, "rejected", "preflight")
    code, said = nvila("status", str(here))
    assert code == Exit.REJECTED and "the gate says no" in said and "not reached" in said


def test_a_run_that_was_killed_does_not_go_on(here: Path) -> None:
    """Its last step says `running` for ever."""
    (here / OWNER).write_text(Process.this().model_copy(update={"pid": 2**22, "born": 1.0}).model_dump_json())
    code, told = _status(here)
    assert (code, told["state"], told["failed_step"]) == (Exit.FAULT, "failed", "preflight")
    assert {step["name"]: step["status"] for step in told["steps"]}["preflight"] == "killed"


def test_the_log_of_a_step_of_this_machine(here: Path) -> None:
    """The log of the whole run is a thousand lines, most of them of other steps."""
    parts = [("resolve", "first"), ("preflight", "a try"), ("preflight", "another\ntry")]
    lines = [f"10:00:00.1 - INFO - Executing task \x1b[96m'{step}'\x1b[0m\n{text}\n" for step, text in parts]
    (here / LOG).write_text("Running pipeline\n" + "".join(lines))
    assert nvila("logs", "latest", "preflight", "--runs", str(here.parent)) == (0, "another try")
    assert nvila("logs", str(here), "resolve") == (0, "first")
    for step, words in (("gate", "has not begun"), ("gates", "no such step")):
        code, said = nvila("logs", str(here), step)
        assert code == Exit.USER and words in said


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("status", "--wait"), "--wait: goes with a run"),
        (("status", "--host", "http://127.0.0.1:9"), "--host: goes with a run"),
        (("status", "r0"), "no such run on this machine, and no Kubeflow is named"),
        (("logs", "r0", "gate"), "KF_PIPELINES_ENDPOINT"),
        (("status", "HERE", "--ca-cert", "x.pem"), "this run is on this machine"),
    ],
)
def test_options_that_cannot_take_effect_are_refused(here: Path, arguments: tuple[str, ...], words: str) -> None:
    """A run that is looked for in the wrong place is not found, and nobody knows why."""
    given = [str(here) if word == "HERE" else word for word in arguments]
    code, said = nvila(*given)
    assert code == Exit.USER and words in said
