"""The launcher: nothing it starts outlives it, and what the worker says reaches the caller."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from nvila.components.contracts.errors import DataError, Preempted, TrainingError
from nvila.components.contracts.exits import Exit
from nvila.components.train import launch as launching
from nvila.components.train.job import Job

MakeJob = Callable[..., Job]
PYTHON = sys.executable
LAUNCH = """
import sys
from nvila.components.train import launch
from nvila.components.train.job import Job
launch.sys.executable = sys.argv[1]
launch.launch(Job.model_validate_json(open(sys.argv[2]).read()))
"""


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """A shell script in the place of Python with torchrun: `$OUT` is the job's folder."""

    def make(script: str) -> Path:
        path = tmp_path / "python"
        path.write_text('#!/bin/bash\nfor last; do :; done\nOUT=$(dirname "$last")\n' + script)
        path.chmod(0o755)
        monkeypatch.setattr(launching.sys, "executable", str(path))
        return path

    return make


def wait_for(there: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + 20
    while not there():
        assert time.monotonic() < deadline, what
        time.sleep(0.02)


def test_a_killed_launcher_leaves_no_process(make_job: MakeJob, stand_in: Callable[[str], Path]) -> None:
    """An orphan trains on, holds the GPUs, and writes into the folder of the next attempt."""
    job = make_job("a")
    python = stand_in(
        'trap "echo stopped > $OUT/last; exit 0" TERM\necho $$ > $OUT/pid\nwhile :; do sleep 0.05; done\n'
    )
    out = Path(job.out)
    (out / "in.json").write_text(job.model_dump_json())
    launcher = subprocess.Popen([PYTHON, "-c", LAUNCH, str(python), str(out / "in.json")])
    wait_for(lambda: (out / "pid").exists() and bool((out / "pid").read_text()), "the launcher started nothing")
    launcher.kill()
    launcher.wait(10)
    wait_for(lambda: (out / "last").exists(), "the child was not told")
    child = int((out / "pid").read_text())
    wait_for(lambda: not Path(f"/proc/{child}").exists(), "the child lives on")


def test_a_request_to_stop_is_handed_on(make_job: MakeJob, stand_in: Callable[[str], Path]) -> None:
    """SIGTERM that ends the launcher alone loses everything since the last checkpoint."""
    job = make_job("a")
    stand_in('trap "echo saved > $OUT/saved; exit 1" TERM\nkill -TERM $PPID\nwhile :; do sleep 0.05; done\n')
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Preempted, match="asked to stop"):
        launching.launch(job)
    assert Path(job.out, "saved").exists()
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_worker_that_dies_without_a_word_is_a_fault(make_job: MakeJob, stand_in: Callable[[str], Path]) -> None:
    """A process killed for its memory must not look like success, nor like the user's mistake."""
    stand_in("kill -9 $$\n")
    with pytest.raises(TrainingError, match="code -9 and no message") as caught:
        launching.launch(make_job("a"))
    assert caught.value.exit_code == Exit.FAULT


def test_an_old_verdict_is_not_believed(make_job: MakeJob, stand_in: Callable[[str], Path]) -> None:
    """The reason of an earlier attempt must not explain the failure of this one."""
    job = make_job("a")
    Path(job.out, "verdict.json").write_text(json.dumps({"error": "DataError", "message": "old", "exit_code": 2}))
    stand_in("exit 1\n")
    with pytest.raises(TrainingError, match="no message"):
        launching.launch(job)


def test_the_workers_own_words_arrive(make_job: MakeJob, stand_in: Callable[[str], Path]) -> None:
    """A missing picture reported as a crash of torchrun is retried for nothing.

    The worker is the real one, without torchrun: it finds the mistake before it needs the other processes.
    """
    job = make_job("a", stage={"data": {"colours.sft": 1, "nowhere.sft": 1}})
    stand_in(f'exec {PYTHON} -m nvila.components.train.worker "$last" 2> $OUT/errors\n')
    with pytest.raises(DataError, match=r"no samples in nowhere\.sft") as caught:
        launching.launch(job)
    assert caught.value.exit_code == Exit.USER
    assert "Traceback" not in Path(job.out, "errors").read_text()
