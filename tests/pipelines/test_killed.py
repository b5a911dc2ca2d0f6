"""What is said of a run that was killed or stopped: by its own last words, and by the next run."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from rich.console import Console

from nvila.components.contracts.children import killed_by
from nvila.components.contracts.exits import Exit
from nvila.components.contracts.manifest import Manifest
from nvila.components.contracts.pipelines import PIPELINES
from nvila.components.contracts.steps import ROWS
from nvila.components.runner.status import Run, note_killed
from nvila.pipelines.local import run as local
from nvila.pipelines.local.run import _exit_code, _last_alive, _write_report
from nvila.pipelines.show.results import show_closing
from nvila.pipelines.show.summary import write_summary

HOLDER = """
import fcntl, subprocess, sys, time
log = open(sys.argv[1], "a+b")
fcntl.flock(log, fcntl.LOCK_SH)
subprocess.Popen([sys.executable, "-c", "print(1, flush=True); import time; time.sleep(float(input()))"], stdout=log)
time.sleep(60)
"""

LIFECYCLE = PIPELINES["lifecycle"]


def left(run: Path, *done: str, running: str = "") -> Path:
    """The folder of a run of which these steps are done, and one was running when it was killed."""
    (run / "steps").mkdir(parents=True)
    (run / "log.txt").write_text("the last line\n")
    for name in (*done, *([running] if running else [])):
        record: dict[str, Any] = {"name": name, "status": "running", "started": 100.0, "pid": 1}
        if name != running:
            manifest = run / "made" / f"{name}.json"
            Manifest(step=name, key="k", kind="metrics").save(manifest)
            record |= {"status": "done", "ended": 101.0, "seconds": 1.0, "exit_code": 0, "manifest": str(manifest)}
        (run / "steps" / f"{name}.json").write_text(json.dumps(record))
    return run


def test_a_killed_step_is_not_shown_as_running(tmp_path: Path) -> None:
    """The table that is printed last, and summary.json, said `running`, with seconds that grew."""
    run = left(tmp_path / "r", "resolve", "preflight", running="validate")
    finished = Run.read(run)
    code = _exit_code(finished, 1)
    summary = write_summary(finished, 1.0, 0, code)
    assert (code, summary.decision) == (Exit.FAULT, "failed")
    assert {s.name: s.status for s in summary.steps}["validate"] == "killed"
    assert "validate was killed" in (summary.message or "")
    out = io.StringIO()
    show_closing(finished, summary, Console(file=out, width=140))
    assert "running" not in out.getvalue() and "killed" in out.getvalue()


@pytest.mark.parametrize("count", range(len(ROWS)))
def test_only_a_whole_run_is_done(tmp_path: Path, count: int) -> None:
    """A worker that ends with 0 before the last step has begun is no success, whatever made it end."""
    finished = Run.read(left(tmp_path / "r", *list(ROWS)[:count]))
    assert _exit_code(finished, Exit.DONE) == Exit.FAULT
    assert write_summary(finished, 1.0, 0, Exit.FAULT).decision == "failed"


def test_a_whole_run_is_done(tmp_path: Path) -> None:
    """The counterpart."""
    assert _exit_code(Run.read(left(tmp_path / "r", *ROWS)), Exit.DONE) == Exit.DONE


class _Asked(local._Stop):
    """A stop that was asked for while the last step ended."""

    def __init__(self) -> None:
        super().__init__()
        self.asked = 1

    def pass_on(self, child: object) -> None: ...


@pytest.mark.parametrize(("code", "said"), [(0, 0), (1, 75), (75, 75)])
def test_a_stop_that_comes_too_late(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, said: int) -> None:
    """The model is served and the alias moved: `preempted; run it again` would be wrong."""
    monkeypatch.setattr(local.sys, "executable", str(tmp_path / "python"))
    (tmp_path / "python").write_text(f"#!/bin/sh\nexit {code}\n")
    (tmp_path / "python").chmod(0o755)
    run = left(tmp_path / "runs" / "r")
    assert local._watched(run, LIFECYCLE, tmp_path / "store", Console(file=io.StringIO()), _Asked()) == said


def test_a_killed_worker_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last line of the log, whatever that was, was given as the reason."""
    monkeypatch.setattr(local.sys, "executable", str(tmp_path / "python"))
    (tmp_path / "python").write_text("#!/bin/sh\necho all is well\nkill -9 $$\n")
    (tmp_path / "python").chmod(0o755)
    run = left(tmp_path / "runs" / "r", "resolve")
    with local._Stop() as stop:
        code = local._watched(run, LIFECYCLE, tmp_path / "store", Console(file=io.StringIO()), stop)
    finished = Run.read(run)
    assert _exit_code(finished, code) == Exit.FAULT
    assert "runs the steps was killed by signal 9" in (write_summary(finished, 1.0, 0, Exit.FAULT).message or "")


def test_a_run_lives_as_long_as_any_of_its_processes(tmp_path: Path) -> None:
    """`nvila run` may be killed outright while a step goes on for a minute: the next run must not call it dead."""
    run = left(tmp_path / "r")
    assert _last_alive(run) == pytest.approx((run / "log.txt").stat().st_mtime)
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(run / "log.txt")], stdin=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 30
    while "1\n" not in (run / "log.txt").read_text() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert _last_alive(run) is None
    holder.kill()
    holder.wait()
    assert _last_alive(run) is None
    assert holder.stdin
    holder.stdin.write("0\n")
    holder.stdin.close()
    while _last_alive(run) is None and time.monotonic() < deadline:
        time.sleep(0.02)
    assert _last_alive(run) is not None


def test_of_a_folder_without_log_nobody_knows(tmp_path: Path) -> None:
    """Steps that were started by hand have none; their run must not be ended under them."""
    assert _last_alive(tmp_path) is None


def test_a_run_that_was_stopped_has_a_report(tmp_path: Path) -> None:
    """The exit task was not reached; README promises the page whatever happens."""
    run = left(tmp_path / "r", "resolve")
    _write_report(run)
    page = (run / "report.html").read_text()
    assert "Not finished" in page and "ended before preflight began" in page
    (run / "report.html").write_text("of the step")
    _write_report(run)
    assert (run / "report.html").read_text() == "of the step"


STUBBORN = """#!/bin/sh
trap '' TERM INT HUP QUIT
setsid sleep 60 &
echo $! > {left}.part && mv {left}.part {left}
while :; do sleep 1; done
"""


@pytest.mark.parametrize("number", local._Stop.SIGNALS)
def test_a_second_signal_ends_a_run_that_hears_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest, number: signal.Signals
) -> None:
    """A closed terminal ended `nvila run` without a summary; a second Ctrl-C left processes outside the group."""
    python, left_behind = tmp_path / "python", tmp_path / "left"
    monkeypatch.setattr(local.sys, "executable", str(python))
    python.write_text(STUBBORN.format(left=left_behind))
    python.chmod(0o755)
    run = left(tmp_path / "runs" / "r")

    def ask() -> None:
        while not left_behind.is_file():
            time.sleep(0.02)
        for _ in range(2):
            os.kill(os.getpid(), number)
            time.sleep(0.1)

    monkeypatch.setattr(local, "_let_go_of_terminal", lambda: None)  # of the tests themselves
    before = signal.signal(number, signal.SIG_DFL)  # tests that run under `nohup` ignore SIGHUP, and so would the run
    request.addfinalizer(lambda: signal.signal(number, before))
    with local._Stop() as stop:
        asking = threading.Thread(target=ask)
        asking.start()
        assert local._watched(run, LIFECYCLE, tmp_path / "store", Console(file=io.StringIO()), stop) == Exit.PREEMPTED
        asking.join()
    process = psutil.Process(pid) if psutil.pid_exists(pid := int(left_behind.read_text())) else None
    assert process is None or process.wait(5) is None


def test_signal_9_is_named(tmp_path: Path) -> None:
    """`was killed before it could say why` named neither the signal nor who sends it."""
    run = left(tmp_path / "r", running="validate")
    note_killed(run, 1, killed_by(signal.SIGKILL))
    words = write_summary(Run.read(run), 1.0, 0, Exit.FAULT).message or ""
    assert "validate was killed by signal 9 (SIGKILL), often the system's out-of-memory killer" in words
    assert "signal 35" in killed_by(35), "a signal without a name"


def test_what_killed_an_earlier_attempt_is_not_said_of_a_later_one(tmp_path: Path) -> None:
    """The process that sees to it was killed itself: too little memory was blamed on the note of another attempt."""
    run = left(tmp_path / "r", running="validate")
    note_killed(run, 2, killed_by(signal.SIGSEGV))
    assert "SIGSEGV" not in (write_summary(Run.read(run), 1.0, 0, Exit.FAULT).message or "")


ASK = """
import os, subprocess, sys, time
os.mkfifo(sys.argv[1])
command = [sys.executable, "-m", "nvila.components.serve.batch", sys.argv[1], "out", "--model", "m", "--what", "{}"]
print(subprocess.Popen([*command, "--parent", str(os.getpid())]).pid, flush=True)
time.sleep(60)
"""


def test_a_killed_step_leaves_no_vllm_behind(tmp_path: Path) -> None:
    """It went on for an hour, with the memory of a model, and nobody read its answers."""
    asked = tmp_path / "asked"
    step = subprocess.Popen([sys.executable, "-c", ASK, str(asked)], stdout=subprocess.PIPE, text=True)
    assert step.stdout
    vllm = psutil.Process(int(step.stdout.readline()))
    with asked.open("w"):  # it is read by now: the child has come up
        step.kill()
        step.wait()
        assert not psutil.wait_procs([vllm], timeout=10)[1]
