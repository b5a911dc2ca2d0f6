"""Steps as forks of the worker, through KFP's real local runner: as apart as interpreters of their own, and quicker."""

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
from kfp import dsl, local

from nvila.pipelines import forks


@dsl.component(base_image="python", install_kfp_package=False)
def note(path: str, seconds: float = 0.0) -> str:
    """Write down what a task sees of its process, then change it."""
    import atexit
    import json
    import os
    import signal
    import sys
    import time
    from pathlib import Path

    seen = {
        "pid": os.getpid(),
        "parent": os.getppid(),
        "changed": os.environ.get("NVILA_TEST_CHANGED"),
        "library": "library_of_the_test" in sys.modules,
        "sigterm": signal.getsignal(signal.SIGTERM) == signal.SIG_DFL,
    }
    Path(path).write_text(json.dumps(seen))
    os.environ["NVILA_TEST_CHANGED"] = "yes"
    atexit.register(Path(path + ".exit").touch)
    print("a word on stdout")
    print("a word on stderr", file=sys.stderr)
    time.sleep(seconds)
    return str(os.getpid())


@dsl.component(base_image="python", install_kfp_package=False)
def leave(code: int, after: str) -> None:
    """End the process with an exit code."""
    raise SystemExit(code)


@dsl.pipeline(name="notes")
def notes(first: str, second: str, seconds: float) -> None:
    before = note(path=first, seconds=seconds)
    note(path=second).after(before)


@dsl.pipeline(name="failing")
def failing(path: str) -> None:
    left = leave(code=3, after="")
    note(path=path).after(left)


@pytest.fixture
def forked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """KFP's local runner forks this process; the only library to import is one of ours."""
    from kfp.local import subprocess_task_handler

    (tmp_path / "library_of_the_test.py").touch()
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "library_of_the_test", raising=False)
    monkeypatch.setattr(forks, "_TRACKING", ())
    monkeypatch.setattr(forks, "_MODEL", ("library_of_the_test",))
    monkeypatch.setattr(forks, "_SKIPPED_WITHIN_SECONDS", 0.3)
    monkeypatch.setattr(subprocess_task_handler, "run_local_subprocess", subprocess_task_handler.run_local_subprocess)
    local.init(runner=local.SubprocessRunner(use_venv=False), pipeline_root=str(tmp_path / "kfp"))
    forks.run_steps_in_forks()
    return tmp_path


def seen(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_text()))


def test_tasks_share_nothing_but_what_was_imported_for_them(forked: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """A step that finds another's variables works otherwise here than in a container, where nobody sees it."""
    notes(first=str(forked / "first"), second=str(forked / "second"), seconds=1.5)
    first, second = seen(forked / "first"), seen(forked / "second")
    assert first["parent"] == second["parent"] == os.getpid() and first["pid"] != second["pid"]
    assert (first["changed"], second["changed"], os.environ.get("NVILA_TEST_CHANGED")) == (None, None, None)
    assert (first["library"], second["library"]) == (False, True)
    assert first["sigterm"] and second["sigterm"]
    assert (forked / "first.exit").exists(), "what a step registers for its end is not done"
    written = capfd.readouterr()
    assert "\na word on stdout\n" in written.out and written.err.count("a word on stderr") == 2


def test_a_short_task_costs_no_import(forked: Path) -> None:
    """A run that only skips must not wait for torch."""
    notes(first=str(forked / "first"), second=str(forked / "second"), seconds=0.0)
    assert not seen(forked / "second")["library"] and "library_of_the_test" not in sys.modules


def test_a_failed_task_ends_the_pipeline(forked: Path) -> None:
    """KFP knows a failure by the exit code alone; what comes after must not run on half an input."""
    with pytest.raises(RuntimeError, match="failing"):
        failing(path=str(forked / "after"))
    assert not (forked / "after").exists()


def test_a_task_ends_with_the_worker() -> None:
    """A step that outlives a killed worker writes into the store while the next run works there."""
    code = (
        "from nvila.pipelines.forks import _Forks\n"
        "command = ['ephemeral_component.py', 'import time\\ndef wait(): time.sleep(60)']\n"
        "_Forks().run([*command, '--executor_input', '{\"outputs\": {}}', '--function_to_execute', 'wait'])"
    )
    worker = subprocess.Popen([sys.executable, "-c", code])
    deadline = time.monotonic() + 30
    while not (children := psutil.Process(worker.pid).children()) and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.5)
    worker.send_signal(signal.SIGKILL)
    worker.wait(10)
    _, alive = psutil.wait_procs(children, timeout=20)
    assert children and alive == []
