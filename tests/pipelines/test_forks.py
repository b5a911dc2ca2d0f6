"""Steps as forks of one process, through KFP's real local runner: as apart as new interpreters, and quicker."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
from kfp import dsl, local

from nvila.pipelines.local import forks
from nvila.pipelines.local.fork_client import SOCKET


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
        "changed": os.environ.get("CHANGED_BY_A_TASK"),
        "path": os.environ["PATH"],
        "library": "library_of_the_test" in sys.modules,
        "sigterm": signal.getsignal(signal.SIGTERM) == signal.SIG_DFL,
    }
    Path(path).write_text(json.dumps(seen))
    os.environ["CHANGED_BY_A_TASK"] = "yes"
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


BIN = Path("a temporary folder, é", "x" * 120, "bin")
"""As `TMPDIR` may have it: the address of a socket has room for 107 bytes."""
SERVER = """
import sys
from nvila.pipelines.local import forks
forks.ALWAYS_NEEDED, forks.FOR_WORK, forks.SHORT_SECONDS = ("kfp.dsl.executor",), ("library_of_the_test",), 0.3
try:
    import nvila.trying
except ImportError:
    pass
forks.main(sys.argv[1:])
"""
"""The process that forks; the only library to import while steps work is one of ours."""


@pytest.fixture
def client(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The `python3` of this process hands its arguments over; the folder of the run."""
    (tmp_path / "library_of_the_test.py").touch()
    (tmp_path / "steps").mkdir()
    bin = tmp_path / BIN
    bin.mkdir(parents=True)
    forks.put_client(bin)
    monkeypatch.setenv("PATH", f"{bin}:{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}")
    monkeypatch.setenv("_KFP_RUNTIME", "true")  # as KFP's command does
    return tmp_path


@contextmanager
def serving(folder: Path) -> Iterator[subprocess.Popen[bytes]]:
    """The process that forks."""
    server = forks.start(folder / BIN, folder, ("-c", SERVER))
    yield server
    server.terminate()
    assert server.wait(20) == 0


@contextmanager
def forking(folder: Path) -> Iterator[subprocess.Popen[bytes]]:
    """KFP's local runner runs its tasks so."""
    local.init(runner=local.SubprocessRunner(use_venv=False), pipeline_root=str(folder / "kfp"))
    with serving(folder) as server, pytest.MonkeyPatch.context() as patch:
        patch.delenv("_KFP_RUNTIME")
        patch.setattr(sys, "executable", "python3")
        yield server


@pytest.fixture
def forked(client: Path) -> Iterator[Path]:
    """It does in this test."""
    with forking(client):
        yield client


def seen(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_text()))


def test_tasks_share_nothing_but_what_was_imported_for_them(client: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """A step that finds another's variables works otherwise here than in a container, where nobody sees it."""
    (client / "steps" / "validate.json").write_text('{"name": "validate", "status": "done"}')
    with forking(client) as server:
        notes(first=str(client / "first"), second=str(client / "second"), seconds=1.5)
    first, second = seen(client / "first"), seen(client / "second")
    assert first["parent"] == second["parent"] == server.pid and first["pid"] != second["pid"]
    assert (first["changed"], second["changed"], os.environ.get("CHANGED_BY_A_TASK")) == (None, None, None)
    assert (first["library"], second["library"]) == (False, True)
    assert first["sigterm"] and second["sigterm"]
    assert (client / "first.exit").exists(), "what a step registers for its end is not done"
    written = capfd.readouterr()
    assert "\na word on stdout\n" in written.out and written.err.count("a word on stderr") == 2


def test_a_run_that_only_skips_waits_for_no_import(forked: Path) -> None:
    """torch takes seconds to import, and a run that finds everything finished needs none of it."""
    for name, status in (("validate", "cached"), ("report", "done")):
        (forked / "steps" / f"{name}.json").write_text(json.dumps({"name": name, "status": status}))
    notes(first=str(forked / "first"), second=str(forked / "second"), seconds=0.5)
    assert not seen(forked / "second")["library"]


def test_what_a_task_is_given_arrives_as_it_was(forked: Path) -> None:
    """KFP's local runner writes its interpreter wherever an argument says python3; and a step looks up our client."""
    place = forked / "lib" / "python3"
    place.mkdir(parents=True)
    notes(first=str(place / "first"), second=str(place / "second"), seconds=0.0)
    assert seen(place / "first")["path"] == os.environ["PATH"].partition(":")[2]
    scripts = Path(tempfile.gettempdir()).glob("tmp.*/ephemeral_component.py")
    assert not any("CHANGED_BY_A_TASK" in script.read_text() for script in scripts)


def test_a_task_runs_the_code_that_is_on_disk(client: Path) -> None:
    """A key is made of the files: a step that ran older code would be stored, and found again, under the new."""
    (client / "nvila").mkdir()
    module = client / "nvila" / "trying.py"
    module.write_text("VALUE = 'old'\n")
    os.utime(module, (1, 1))
    source = f"import nvila.trying, pathlib\npathlib.Path({str(client / 'read')!r}).write_text(nvila.trying.VALUE)"
    with serving(client):
        for value in ("old", "newer"):
            if value == "newer":
                module.write_text("VALUE = 'newer'\n")
            assert task(client, source).wait(60) == 0
            assert (client / "read").read_text() == value


def test_tasks_at_once_end_each_for_itself(client: Path) -> None:
    """Branches of a pipeline run at once: one that hears of its end only with the last holds what follows it up."""
    with serving(client):
        short, long = (task(client, f"import time; time.sleep({seconds})") for seconds in (2, 30))
        assert short.wait(20) == 0 and long.poll() is None
        long_step = max(psutil.Process().children(recursive=True), key=lambda one: one.create_time())
        long_step.kill()
        assert long.wait(20) == 128 + signal.SIGKILL


def test_a_stop_reaches_a_task_once(client: Path) -> None:
    """The whole group is told. A second signal, from a process that ends before its forks, hurries what is saved."""
    begun, saved = client / "begun", client / "saved"
    source = f"import pathlib, time; pathlib.Path({str(begun)!r}).touch(); time.sleep(2); "
    with serving(client) as server:
        step = task(client, source + f"pathlib.Path({str(saved)!r}).touch()")
        wait_for(begun)
        server.terminate()
        assert step.wait(20) == 0 and saved.exists()


def test_no_import_asks_for_a_gpu() -> None:
    """CUDA that was asked in this process answers no fork of it: every step on a GPU machine would fail."""
    code = (
        "import os\n"
        "from nvila.components.contracts.surroundings import settle\n"
        "settle()\n"
        "assert os.environ['PYTORCH_NVML_BASED_CUDA_CHECK'] == '1'  # is_available asks the driver's library then\n"
        "import torch\n"
        "from importlib import import_module\n"
        "from nvila.pipelines.local.forks import ALWAYS_NEEDED, FOR_WORK\n"
        "def refuse(*given): raise AssertionError('asked for a GPU')\n"
        "for name in ('init', '_lazy_init', 'current_device'):\n"
        "    setattr(torch.cuda, name, refuse)\n"
        "for name in (*ALWAYS_NEEDED, *FOR_WORK): import_module(name)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_failed_task_ends_the_pipeline(forked: Path) -> None:
    """KFP knows a failure by the exit code alone; what comes after must not run on half an input."""
    with pytest.raises(RuntimeError, match="failing"):
        failing(path=str(forked / "after"))
    assert not (forked / "after").exists()


@pytest.mark.parametrize("edited", [False, True])
def test_a_task_ends_with_the_worker(client: Path, edited: bool) -> None:
    """A step that outlives a killed worker writes into the store while the next run works there; one with an
    interpreter of its own did."""
    if edited:
        (client / "nvila").mkdir()
        (client / "nvila" / "trying.py").touch()
        os.utime(client / "nvila" / "trying.py", (time.time() + 3600,) * 2)
    begun = client / "begun"
    code = (
        "import sys, time; from pathlib import Path; from nvila.pipelines.local import forks\n"
        f"forks.start(Path(sys.argv[1], {str(BIN)!r}), Path(sys.argv[1]), ('-c', {SERVER!r})); time.sleep(60)"
    )
    worker = subprocess.Popen([sys.executable, "-c", code, str(client)])
    while not (client / BIN / SOCKET).exists():
        time.sleep(0.05)
    step = task(client, f"import pathlib, time; pathlib.Path({str(begun)!r}).touch(); time.sleep(60)")
    wait_for(begun)
    children = psutil.Process(worker.pid).children(recursive=True)
    assert len(children) == 2
    worker.kill()
    worker.wait(10)
    _, alive = psutil.wait_procs(children, timeout=20)
    assert alive == [] and step.wait(20)


def task(folder: Path, source: str) -> subprocess.Popen[bytes]:
    """A task as KFP's command starts it; what it does is `source`."""
    script = Path(tempfile.mkdtemp(dir=folder), "ephemeral_component.py")
    script.write_text(f"def work():\n    exec({source!r})\n")
    given = json.dumps({"outputs": {"outputFile": str(folder / "executor_output.json")}})
    words = ["--component_module_path", str(script), "--executor_input", given, "--function_to_execute", "work"]
    return subprocess.Popen(["python3", "-m", "kfp.dsl.executor_main", *words])


def wait_for(file: Path) -> None:
    deadline = time.monotonic() + 60
    while not file.exists():
        assert time.monotonic() < deadline, f"no {file.name}"
        time.sleep(0.05)
