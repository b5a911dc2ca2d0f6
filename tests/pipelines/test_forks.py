"""Steps as forks of the worker, through KFP's real local runner: as apart as interpreters of their own, and quicker."""

import json
import os
import signal
import subprocess
import sys
import time
from importlib import import_module
from pathlib import Path
from typing import Any

import psutil
import pytest
from kfp import dsl, local

from nvila.pipelines.local import forks


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
    monkeypatch.setattr(forks, "_ALWAYS_NEEDED", ())
    monkeypatch.setattr(forks, "_FOR_WORK", ("library_of_the_test",))
    monkeypatch.setattr(forks, "_SHORT_SECONDS", 0.3)
    monkeypatch.setattr(subprocess_task_handler, "run_local_subprocess", subprocess_task_handler.run_local_subprocess)
    monkeypatch.delitem(sys.modules, "nvila.trying", raising=False)
    (tmp_path / "steps").mkdir()
    local.init(runner=local.SubprocessRunner(use_venv=False), pipeline_root=str(tmp_path / "kfp"))
    forks.run_steps_in_forks(tmp_path)
    return tmp_path


def seen(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_text()))


def test_tasks_share_nothing_but_what_was_imported_for_them(forked: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """A step that finds another's variables works otherwise here than in a container, where nobody sees it."""
    (forked / "steps" / "validate.json").write_text('{"name": "validate", "status": "done"}')
    notes(first=str(forked / "first"), second=str(forked / "second"), seconds=1.5)
    first, second = seen(forked / "first"), seen(forked / "second")
    assert first["parent"] == second["parent"] == os.getpid() and first["pid"] != second["pid"]
    assert (first["changed"], second["changed"], os.environ.get("NVILA_TEST_CHANGED")) == (None, None, None)
    assert (first["library"], second["library"]) == (False, True)
    assert first["sigterm"] and second["sigterm"]
    assert (forked / "first.exit").exists(), "what a step registers for its end is not done"
    written = capfd.readouterr()
    assert "\na word on stdout\n" in written.out and written.err.count("a word on stderr") == 2


def test_a_run_that_only_skips_waits_for_no_import(forked: Path) -> None:
    """torch takes seconds to import, and a run that finds everything finished needs none of it."""
    for name, status in (("validate", "cached"), ("report", "done")):
        (forked / "steps" / f"{name}.json").write_text(json.dumps({"name": name, "status": status}))
    notes(first=str(forked / "first"), second=str(forked / "second"), seconds=0.5)
    assert not seen(forked / "second")["library"] and "library_of_the_test" not in sys.modules


def test_a_task_runs_the_code_that_is_on_disk(forked: Path) -> None:
    """A key is made of the files: a step that ran older code would be stored, and found again, under the new."""
    package = forked / "nvila"
    package.mkdir()
    source = (
        "from pathlib import Path\n"
        "def read():\n"
        "    import nvila.trying\n"
        f"    Path({str(forked / 'read')!r}).write_text(nvila.trying.VALUE)"
    )
    (package / "trying.py").write_text("VALUE = 'old'\n")
    os.utime(package / "trying.py", (1, 1))
    import_module("nvila.trying")
    steps = forks._Forks(forked)
    for value in ("old", "newer"):
        if value == "newer":
            (package / "trying.py").write_text("VALUE = 'newer'\n")
        assert steps.run(command(source, "read", forked)) == 0
        assert (forked / "read").read_text() == value


def test_no_import_asks_for_a_gpu() -> None:
    """CUDA that was asked in this process answers no fork of it: every step on a GPU machine would fail."""
    code = (
        "import torch\n"
        "from importlib import import_module\n"
        "from nvila.pipelines.local.forks import _ALWAYS_NEEDED, _FOR_WORK\n"
        "def refuse(*given): raise AssertionError('asked for a GPU')\n"
        "for name in ('is_available', 'device_count', 'init', '_lazy_init', 'current_device'):\n"
        "    setattr(torch.cuda, name, refuse)\n"
        "for name in (*_ALWAYS_NEEDED, *_FOR_WORK): import_module(name)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_failed_task_ends_the_pipeline(forked: Path) -> None:
    """KFP knows a failure by the exit code alone; what comes after must not run on half an input."""
    with pytest.raises(RuntimeError, match="failing"):
        failing(path=str(forked / "after"))
    assert not (forked / "after").exists()


def test_a_task_ends_with_the_worker(tmp_path: Path) -> None:
    """A step that outlives a killed worker writes into the store while the next run works there."""
    source = f"def wait():\n    import time\n    open({str(tmp_path / 'begun')!r}, 'w')\n    time.sleep(60)"
    code = (
        "import json, sys\n"
        "from pathlib import Path\n"
        "from nvila.pipelines.local.forks import _Forks\n"
        "_Forks(Path()).run(json.loads(sys.argv[1]))"
    )
    worker = subprocess.Popen([sys.executable, "-c", code, json.dumps(command(source, "wait", tmp_path))])
    deadline = time.monotonic() + 30
    while not (tmp_path / "begun").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    (task,) = psutil.Process(worker.pid).children()
    worker.send_signal(signal.SIGKILL)
    worker.wait(10)
    _, alive = psutil.wait_procs([task], timeout=20)
    assert alive == []


def command(source: str, function: str, folder: Path) -> list[str]:
    """What KFP hands to a runner, as far as a fork reads it."""
    given = json.dumps({"outputs": {"outputFile": str(folder / "executor_output.json")}})
    return ["ephemeral_component.py", source, "--executor_input", given, "--function_to_execute", function]
