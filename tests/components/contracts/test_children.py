"""Commands of others on a leash: nothing of them is left, whatever ends first."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from nvila.components.contracts.children import first_to_end, how_ended, leashed
from nvila.components.contracts.processes import birth

NESTED = """
import gc, os, sys
from nvila.components.contracts.children import forking

class Threaded:
    def __init__(self):
        self.cycle, self.process = self, os.getpid()
    def __del__(self):
        if os.getpid() != self.process:
            os._exit(3)

gc.disable()
Threaded()
def fork(then):
    with forking():
        process = os.fork()
        if not process:
            then()
            gc.collect()
            os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 0, then
fork(lambda: fork(lambda: None))
assert gc.get_freeze_count() == 0
"""
COMMAND = """
import os, signal, subprocess, sys, time
from pathlib import Path
engine = "import time; print(1, flush=True); time.sleep(300)"
if "deaf" in sys.argv:
    engine = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); " + engine
child = subprocess.Popen([sys.executable, "-c", engine], stdout=subprocess.PIPE)
child.stdout.readline()
place = Path(sys.argv[1])
place.with_suffix(".part").write_text(f"{os.getpid()} {child.pid}")
place.with_suffix(".part").rename(place)
time.sleep(float(sys.argv[2]))
"""
"""Stands for a server with an engine in a process of its own."""
STEP = """
import os, sys, time
from nvila.components.contracts import children
print(children.leashed(sys.argv[2:], heirs=sys.argv[1]).pid, flush=True)
time.sleep(300)
"""


HASTY = """
import os, sys
from nvila.components.contracts import children
children.END_SECONDS = 0.3
sys.exit(children._leash(os.getppid(), "", sys.argv[1:]))
"""


def wait_for(there: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + 60
    while not there():
        assert time.monotonic() < deadline, what
        time.sleep(0.02)


def started(place: Path) -> list[psutil.Process]:
    """The command and its child."""
    wait_for(place.exists, "the command did not start")
    return [psutil.Process(int(pid)) for pid in place.read_text().split()]


def gone(processes: list[psutil.Process]) -> bool:
    return not psutil.wait_procs(processes, timeout=40)[1]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_command_that_is_told_to_end_leaves_nothing(tmp_path: Path, number: signal.Signals) -> None:
    """`nvila ui` that was stopped left MLflow's workers, and a server its engine with the memory of a model."""
    before = signal.signal(number, signal.SIG_DFL)  # tests that run under `nohup` ignore SIGHUP, and so would it
    try:
        between = leashed([sys.executable, "-c", COMMAND, str(tmp_path / "pids"), "300"])
    finally:
        signal.signal(number, before)
    both = started(tmp_path / "pids")
    between.send_signal(number)
    assert gone(both)
    assert between.wait(20) == 128 + signal.SIGTERM


def test_a_command_that_ends_leaves_nothing_and_its_code(tmp_path: Path) -> None:
    """A server that the kernel kills for its memory left its engine, which has most of it."""
    command = [sys.executable, "-c", COMMAND + "os._exit(7)", str(tmp_path / "pids"), "0.2", "deaf"]
    between = subprocess.Popen([sys.executable, "-c", HASTY, *command])
    assert gone(started(tmp_path / "pids"))
    assert between.wait(20) == 7


@pytest.mark.parametrize("heir", [None, "alive", "of another birth"])
def test_a_command_ends_with_a_step_that_is_killed_unless_it_has_an_heir(tmp_path: Path, heir: str | None) -> None:
    """A server that was being tried stayed for ever; one that users talk to must, and end with the heir."""
    record = tmp_path / "guards.json"
    command = [sys.executable, "-c", COMMAND, str(tmp_path / "pids"), "300"]
    step = subprocess.Popen([sys.executable, "-c", STEP, str(record), *command], stdout=subprocess.PIPE, text=True)
    assert step.stdout
    between, both = psutil.Process(int(step.stdout.readline())), started(tmp_path / "pids")
    guard = subprocess.Popen(["sleep", "300"])
    born = birth(guard.pid) if heir == "alive" else 1.0
    record.write_text(json.dumps({"guards": [[step.pid, birth(step.pid)], *([[guard.pid, born]] if heir else [])]}))
    step.kill()
    step.wait()
    if heir == "alive":
        time.sleep(0.5)
        assert all(process.is_running() for process in [between, *both])
    else:
        assert gone([between, *both])
    guard.kill()
    guard.wait()
    assert gone([between, *both])


def test_a_command_ends_with_the_process_between(tmp_path: Path) -> None:
    """Its process id is what a person finds in the record, and kills."""
    between = leashed([sys.executable, "-c", COMMAND, str(tmp_path / "pids"), "300"])
    command, engine = started(tmp_path / "pids")
    between.kill()
    between.wait()
    assert gone([command])
    engine.kill()


def test_a_command_of_a_parent_that_is_gone_ends(tmp_path: Path) -> None:
    """Killed at once, a step cannot be waited for any more."""
    code = STEP.replace("time.sleep(300)", "os._exit(0)")
    command = [sys.executable, "-c", COMMAND, str(tmp_path / "pids"), "300"]
    step = subprocess.run([sys.executable, "-c", code, "", *command], stdout=subprocess.PIPE, text=True, check=True)
    between = int(step.stdout)
    wait_for(lambda: not Path("/proc", str(between)).exists(), "the process between lives on")
    if (tmp_path / "pids").exists():
        assert not any(psutil.pid_exists(int(pid)) for pid in (tmp_path / "pids").read_text().split())


def test_of_processes_that_end_together_the_first_is_named() -> None:
    """A pool ends its other processes when one is lost: SIGTERM is no reason."""
    assert first_to_end([None, -15, -9, 0, -15]) == -signal.SIGKILL
    assert first_to_end([0, -15]) == -signal.SIGTERM and first_to_end([None, 0]) is None
    assert how_ended(3) == "ended with code 3" and how_ended(None) == "ended"
    assert how_ended(-11) == "was killed by signal 11 (SIGSEGV)"
    assert "GiB of memory were free" in how_ended(-9)


UI = """
import sys
from pathlib import Path
from nvila.components.contracts.environment import Environment, entered
from nvila.pipelines.commands.ui import serve
with entered(Environment.read()):
    sys.exit(serve(Path(sys.argv[1]), 1))
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_stopped_page_leaves_no_server(tmp_path: Path, number: signal.Signals) -> None:
    """MLflow's server and its dozen workers stayed, with the port, when `nvila ui` was stopped."""
    (tmp_path / "mlflow.db").touch()
    (tmp_path / "mlflow.py").write_text(f"import sys\nsys.argv[1:] = [{str(tmp_path / 'pids')!r}, '300']\n{COMMAND}")
    variables = os.environ | {"PYTHONPATH": f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}"}
    variables.pop("MLFLOW_TRACKING_URI", None)
    page = subprocess.Popen([sys.executable, "-c", UI, str(tmp_path)], env=variables)
    both = started(tmp_path / "pids")
    page.send_signal(number)
    assert page.wait(30) == (0 if number == signal.SIGTERM else -number)
    assert gone(both)


def test_a_fork_that_forks_leaves_alone_what_it_was_forked_with() -> None:
    """A rank forked its loader, from then on collected what the step had dropped, and waited there for threads that
    only the step has."""
    ended = subprocess.run([sys.executable, "-c", NESTED], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
