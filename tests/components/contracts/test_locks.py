"""Work goes on where a file system has no locks or no links, or where a folder cannot be written."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import withheld

from nvila.components.contracts.errors import Unreachable
from nvila.components.contracts.exits import Exit
from nvila.components.contracts.locks import alone, is_held, lacking, share
from nvila.components.contracts.processes import Process, birth

HOLD = """
import os, sys
from pathlib import Path
from nvila.components.contracts.errors import Unreachable
from nvila.components.contracts.exits import Exit
from nvila.components.contracts.locks import alone, lacking
from nvila.components.contracts.files import link_or_copy
from nvila.components.contracts.index import Index
from nvila.components.tracking.connect import connected, experiment_id, tracking_uri
runs = Path(sys.argv[1])
for _ in range(2):
    with alone(runs / "x.lock"):
        print("held")
link_or_copy(runs / "copy", runs / "file")
assert lacking(runs) and not (runs / "copy").is_symlink() and (runs / "copy").read_text() == "content"
with connected(runs) as client:
    experiment = experiment_id(client, runs)
with connected(runs) as client:
    print(client.get_experiment(experiment).name)
"""


def refused(what: str, code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Python code in a process that some calls are withheld from."""
    command = [sys.executable, withheld.__file__, what, sys.executable, "-c", code, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("error", ["ENOLCK", "ENOSYS", "EOPNOTSUPP"])
def test_work_goes_on_without_locks_and_links(error: str, tmp_path: Path) -> None:
    """Each lock was a traceback, SQLite waited for its own in vain, and a checkpoint could not be laid out."""
    runs = tmp_path / "a b%20c?#"
    runs.mkdir()
    (runs / "file").write_text("content")
    links = "EPERM" if error == "ENOLCK" else "EOPNOTSUPP"
    code = HOLD if error == "ENOLCK" else HOLD[: HOLD.index("with connected")]  # MLflow takes its time
    done = refused(f"locks={error},links={links}", code, str(runs))
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[:2] == ["held", "held"]
    said = [line for line in done.stderr.splitlines() if "x.lock: cannot be locked" in line]
    assert len(said) == 1 and "only this user's processes on this machine wait" in said[0]
    if error == "ENOLCK":
        assert done.stdout.split()[2:] == ["nvila"] and (runs / "mlflow.db").is_file()


def test_a_folder_that_cannot_be_written_is_locked_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who may only read the runs of others must not end in a traceback, nor two of this user's processes collide."""
    monkeypatch.setattr(tempfile, "tempdir", tempfile.mkdtemp(dir="/tmp"))
    Path(tempfile.gettempdir()).chmod(0o777)
    try:
        assert _as_other(lambda: _holds_once(Path("/runs.lock"))) == 0
    finally:
        subprocess.run(["rm", "-r", tempfile.gettempdir()], check=True)


def _holds_once(path: Path) -> bool:
    with alone(path):
        (stand_in,) = Path(tempfile.gettempdir()).glob("*/*.lock")
        return is_held(stand_in) is True


def _as_other(act) -> int:  # type: ignore[no-untyped-def]
    """Exit code of a fork of another user: 0 where `act` says yes."""
    if (child := os.fork()) == 0:
        code = 2
        try:
            os.setuid(12345)
            code = int(not act())
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_who_holds_a_lock_is_told_from_who_does_not(tmp_path: Path) -> None:
    """A run that lives must not be taken for one that was killed."""
    path = tmp_path / "log"
    assert is_held(path) is None
    path.write_text("")
    assert is_held(path) is False and not lacking(tmp_path)
    with path.open("a") as log:
        share(log)
        assert is_held(path) is True
    with alone(path):
        assert is_held(path) is True
    assert is_held(path) is False


def test_who_waits_is_told_for_whom_and_how_long(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """A run that waits for another one looked hung, and nobody knew for which; and a process that hangs held it up for
    ever."""
    path, code = tmp_path / "x.lock", f"{HOLDER}; print(1, flush=True); time.sleep(60)"
    path.write_text("the line of an earlier one, which is longer than the next may be" * 20)
    holder = subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout and holder.stdout.readline()
    with (
        pytest.raises(Unreachable, match=f"building: it was held .* by process {holder.pid} of ") as refused,
        alone(path, "building", 0.3),
    ):
        raise AssertionError("two hold it")
    assert refused.value.exit_code == Exit.PREEMPTED
    said = capfd.readouterr().err
    assert (
        f"by process {holder.pid} of " in said and "time.sleep(60)" in said and said.endswith("waiting 0 s at most\n")
    )
    assert time.strftime("since %Y-%m-%d ") in said
    assert Process.model_validate_json(path.read_text()).pid == holder.pid, "who waits leaves the holder's line alone"
    holder.kill()
    holder.wait()
    with alone(path):
        assert Process.model_validate_json(path.read_text()).pid == os.getpid()


HOLDER = (
    "import sys, time; from pathlib import Path; from nvila.components.contracts import locks; "
    "held = locks.alone(Path(sys.argv[1])); held.__enter__()"
)


def test_a_process_is_known_again(tmp_path: Path) -> None:
    """Another one that has its number since must not be taken for it; nor is one of another machine dead."""
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    me = Process.this()
    its = me.model_copy(update={"pid": child.pid, "born": birth(child.pid)})
    assert me.alive and its.alive
    assert its.model_copy(update={"born": me.born - 1}).alive is False
    assert its.model_copy(update={"host": "elsewhere"}).alive is None
    assert its.model_copy(update={"boot": "before " + me.boot}).alive is False
    assert its.model_copy(update={"boot": me.boot + " of another container"}).alive is None
    child.kill()
    child.wait()
    assert its.alive is False


def test_a_run_is_named_where_there_are_no_links(tmp_path: Path) -> None:
    """`runs/latest` is a convenience: without it the run goes on, and a line says where it lies."""
    run = tmp_path / "20260101T000000Z-micro"
    run.mkdir()
    done = refused("links=EPERM", f"from nvila.pipelines.local import run; run._point_latest(run.Path({str(run)!r}))")
    assert done.returncode == 0 and str(run.parent / "latest") in done.stderr and run.name in done.stderr
