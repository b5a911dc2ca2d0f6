"""The runner: skip, work, manifest, status file, exit code. The steps are small fakes in a temporary package."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from nvila.components.contracts.exits import Exit
from nvila.components.contracts.manifest import Manifest
from nvila.components.runner.execute import Place

STEP = '''
"""A fake step: writes its number, or fails as it is told."""
import os, time
from pathlib import Path
from pydantic import BaseModel
from nvila.components.contracts import errors
from nvila.components.contracts.step import Outcome

class Settings(BaseModel):
    number: int = 0
    fail: str = ""

def external(settings):
    return {"world": os.environ.get("WORLD", "")}

def run(settings, inputs, out):
    with open(os.environ["CALLS"], "a") as calls:
        calls.write("x")
    if settings.fail == "sleep":
        Path(os.environ["CALLS"] + ".started").touch()
        time.sleep(60)
    if settings.fail == "bug":
        raise ZeroDivisionError("a bug")
    if settings.fail:
        raise getattr(errors, settings.fail)("it was told to", where="number", value=settings.number, do="Do not.")
    (out / "number.txt").write_text(str(settings.number + sum(m.values["number"] for m in inputs.values())))
    return Outcome(kind="report", values={"number": settings.number})
'''


class Runner:
    """Runs the fake step in a process of its own, as KFP does."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "fakestep.py").write_text(STEP)
        (folder / "calls").touch()
        self.environment = os.environ | {
            "PYTHONPATH": os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])]),
            "NVILA_STORE": str(folder / "store"),
            "NVILA_RUN": str(folder / "runs" / "r1"),
            "CALLS": str(folder / "calls"),
        }

    def start(self, step: str = "fake", inputs: dict[str, str] | None = None, **settings: Any) -> subprocess.Popen[str]:
        code = (
            "import json, sys\n"
            "import nvila.components.runner.execute as runner\n"
            "runner._track = lambda *args: None\n"  # MLflow has tests of its own and costs seconds here
            "step, inputs, output, settings = json.loads(sys.argv[1])\n"
            "print(json.dumps(runner.execute(step, 'fakestep', None, inputs, output, settings=settings)))"
        )
        arguments = json.dumps([step, inputs or {}, str(self.output(step)), settings])
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        return subprocess.Popen([sys.executable, "-c", code, arguments], env=self.environment, **pipes)

    def run(self, step: str = "fake", inputs: dict[str, str] | None = None, **settings: Any) -> tuple[int, str]:
        """Exit code, and stderr or the metadata."""
        process = self.start(step, inputs, **settings)
        out, error = process.communicate(timeout=60)
        return process.returncode, out if process.returncode == 0 else error

    def output(self, step: str = "fake") -> Path:
        return self.folder / "kfp" / step

    @property
    def calls(self) -> int:
        return len((self.folder / "calls").read_text())

    def status(self, step: str = "fake") -> dict[str, Any]:
        return json.loads((Path(self.environment["NVILA_RUN"]) / "steps" / f"{step}.json").read_text())


@pytest.fixture
def runner(tmp_path: Path) -> Runner:
    return Runner(tmp_path)


def test_finished_work_is_skipped_and_its_output_is_the_same(runner: Runner) -> None:
    """The second run must find the first one's work, in the store and at KFP's place."""
    assert runner.run(number=3)[0] == 0
    first = Manifest.load(runner.output())
    runner.output().unlink()
    code, metadata = runner.run(number=3)
    assert (code, runner.calls, json.loads(metadata)["cached"]) == (0, 1, True)
    assert Manifest.load(runner.output()) == first
    assert (runner.status()["status"], runner.status()["exit_code"]) == ("cached", 0)


def test_settings_world_and_inputs_each_change_the_key(runner: Runner) -> None:
    """Whatever the work depends on and the key does not see gives stale results."""
    runner.run(number=3)
    runner.run(number=4)
    assert runner.calls == 2
    runner.environment["WORLD"] = "changed"
    runner.run(number=4)
    assert runner.calls == 3
    source = str(runner.output())
    runner.run("reader", {"input": source}, number=1)
    runner.run("reader", {"input": source}, number=1)
    assert runner.calls == 4
    runner.run(number=5)
    runner.run("reader", {"input": source}, number=1)
    assert runner.calls == 6


def test_damaged_work_is_done_again(runner: Runner) -> None:
    """A store on a full disk or after a careless `rm` must mend itself."""
    runner.run(number=3)
    folder = Path(Manifest.load(runner.output()).folder)
    (folder / "number.txt").write_text("longer than before")
    assert runner.run(number=3)[0] == 0
    assert (runner.calls, (folder / "number.txt").read_text()) == (2, "3")


@pytest.mark.parametrize(
    ("fail", "code", "status"),
    [
        ("ConfigError", Exit.USER, "failed"),
        ("DataError", Exit.USER, "failed"),
        ("PreflightError", Exit.USER, "failed"),
        ("TrainingError", Exit.FAULT, "failed"),
        ("Rejected", Exit.REJECTED, "rejected"),
        ("Preempted", Exit.PREEMPTED, "preempted"),
        ("bug", Exit.FAULT, "failed"),
    ],
)
def test_each_kind_of_error_has_its_exit_code(runner: Runner, fail: str, code: Exit, status: str) -> None:
    """Launchers decide by the code whether to retry; a wrong one burns a cluster's budget or loses a run."""
    ended, error = runner.run(number=3, fail=fail)
    assert ended == code
    assert (runner.status()["status"], runner.status()["exit_code"]) == (status, code)
    assert not runner.output().exists()
    assert ("Traceback" in error) == (fail == "bug"), "users see one line; faults of ours show where"


def test_users_errors_and_verdicts_are_not_tried_again_in_the_same_run(runner: Runner) -> None:
    """KFP retries blindly: the tombstone must end a retried pod at once, and must not outlive the run."""
    for _ in range(2):
        assert runner.run(fail="Rejected")[0] == Exit.REJECTED
    assert runner.calls == 1
    runner.environment["NVILA_RUN"] = str(runner.folder / "runs" / "r2")
    assert runner.run(fail="Rejected")[0] == Exit.REJECTED
    assert runner.calls == 2


def test_faults_are_tried_again(runner: Runner) -> None:
    """A retry after a lost machine must do the work."""
    for _ in range(2):
        assert runner.run(fail="TrainingError")[0] == Exit.FAULT
    assert runner.calls == 2


def test_steps_that_act_on_the_world_are_never_skipped(runner: Runner) -> None:
    """A dead endpoint must be started again by a run in which nothing else has changed."""
    for _ in range(2):
        assert runner.run("rollout", number=1)[0] == 0
    assert runner.calls == 2 and runner.status("rollout")["status"] == "done"


def test_sigterm_ends_a_step_with_75(runner: Runner) -> None:
    """A preempted pod must be told from a failed one."""
    process = runner.start(fail="sleep")
    deadline = time.monotonic() + 30
    while not (runner.folder / "calls.started").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=30) == Exit.PREEMPTED
    assert runner.status()["status"] == "preempted"


def test_two_processes_with_the_same_work_do_it_once(runner: Runner) -> None:
    """Two runs at the same time share the store; half-written files of one must not be read by the other."""
    both = [runner.start(number=9), runner.start(number=9)]
    assert [process.wait(timeout=60) for process in both] == [0, 0]
    assert runner.calls == 1


def test_run_folder_may_name_a_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a cluster the run's id reaches the pod as a variable of its own."""
    monkeypatch.setenv("NVILA_RUN_ID", "abc")
    monkeypatch.setenv("NVILA_RUN", "/nvila/runs/$NVILA_RUN_ID")
    assert Place.from_environment().run == "abc"
