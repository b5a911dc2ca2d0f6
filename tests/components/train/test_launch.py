"""The launcher: nothing it starts outlives it, and what the worker says reaches the caller."""

from __future__ import annotations

import gc
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from nvila.components.contracts.errors import DataError, NvilaError, Preempted, TrainingError, to_record
from nvila.components.contracts.exits import Exit
from nvila.components.contracts.processes import birth
from nvila.components.train import launch as launching
from nvila.components.train import loop, verdict
from nvila.components.train.job import Job
from nvila.components.train.loop import StopRequest

MakeJob = Callable[..., Job]
LAUNCH = """
import os, sys, time
from pathlib import Path
from nvila.components.train import launch
from nvila.components.train.job import Job
from nvila.components.train.loop import StopRequest

def wait_for_the_end(job):
    StopRequest()
    Path(job).with_name(f"pid-{os.environ['RANK']}").write_text(str(os.getpid()))
    time.sleep(60)  # for another process, say

launch.main = wait_for_the_end
launch.launch(Job.model_validate_json(open(sys.argv[1]).read()))
"""
Work = Callable[[str], object]


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> Callable[[Work], None]:
    """Sets a function in the place of the training; torchrun's agent is the real one and forks it."""
    monkeypatch.delenv("DS_LOG_LEVEL", raising=False)
    return lambda work: monkeypatch.setattr(launching, "main", work)


def wait_for(there: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + 20
    while not there():
        assert time.monotonic() < deadline, what
        time.sleep(0.02)


def test_a_killed_launcher_leaves_no_process(make_job: MakeJob) -> None:
    """An orphan trains on, holds the GPUs, and writes into the folder of the next attempt: that it was told to stop is
    not enough, as it waits for another process."""
    job = make_job("a", run={"gpus": 2})
    out = Path(job.out)
    (out / "in.json").write_text(job.model_dump_json())
    launcher = subprocess.Popen([sys.executable, "-c", LAUNCH, str(out / "in.json")])
    notes = [out / "pid-0", out / "pid-1"]
    wait_for(lambda: all(note.exists() and note.read_text() for note in notes), "the launcher started too few")
    launcher.kill()
    launcher.wait(10)
    wait_for(lambda: not any(Path("/proc", note.read_text()).exists() for note in notes), "a child lives on")


def test_a_request_to_stop_is_handed_on(
    make_job: MakeJob, stand_in: Callable[[Work], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGTERM that ends the launcher alone loses everything since the last checkpoint, and so does one that hurries."""
    job = make_job("a")
    monkeypatch.setenv("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "0")

    def save_when_asked(path: str) -> None:
        stop = StopRequest()
        time.sleep(0.5)  # until the agent has noted down whom it has forked
        os.kill(os.getppid(), signal.SIGTERM)
        wait_for(lambda: stop.asked, "the request did not come")
        time.sleep(1)
        Path(path).with_name("saved").touch()
        os._exit(int(Exit.PREEMPTED))

    stand_in(save_when_asked)
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    before = [signal.getsignal(number) for number in numbers]
    with pytest.raises(Preempted, match="asked to stop"):
        launching.launch(job)
    assert Path(job.out, "saved").exists()
    assert [signal.getsignal(number) for number in numbers] == before


def test_a_worker_that_dies_without_a_word_is_a_fault(make_job: MakeJob, stand_in: Callable[[Work], None]) -> None:
    """A process killed for its memory must not look like success, nor like the user's mistake."""
    stand_in(lambda path: os.kill(os.getpid(), signal.SIGKILL))
    job = make_job("a")
    with pytest.raises(TrainingError, match=r"killed by signal 9 \(SIGKILL\).*memory.* and left no message") as caught:
        launching.launch(job)
    assert caught.value.exit_code == Exit.FAULT
    assert sorted(path.name for path in Path(job.out).iterdir()) == ["job.json"]


def test_a_killed_process_is_named_before_those_that_lost_it(
    make_job: MakeJob, stand_in: Callable[[Work], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """ "Connection closed by peer" hid that the kernel had killed the peer for its memory."""
    job = make_job("a", run={"gpus": 2})
    note = Path(job.out, "second")

    def train(job: Job, stop: StopRequest) -> None:
        if os.environ["RANK"] == "1":
            note.write_text(str(os.getpid()))
            os.kill(os.getpid(), signal.SIGKILL)
        wait_for(lambda: note.exists() and bool(note.read_text()), "the other did not start")
        wait_for(lambda: birth(int(note.read_text())) is None, "the other lives")
        raise RuntimeError("Connection closed by peer")

    monkeypatch.setattr(loop, "train", train)
    stand_in(loop.main)
    with pytest.raises(TrainingError, match=r"killed by signal 9 \(SIGKILL\)"):
        launching.launch(job)


def test_a_process_that_waits_for_one_that_failed_ends_too(
    make_job: MakeJob, stand_in: Callable[[Work], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that waits in a collective hears no signal: the agent kills it after half a minute, torch after half an hour.
    And what ends a process in Python without an exception was "code 1 and no message"."""
    job = make_job("a", run={"gpus": 2})
    out = Path(job.out)
    monkeypatch.setattr(verdict, "GRACE_SECONDS", 0.5)

    def train(job: Job, stop: StopRequest) -> None:
        verdict.obey(out)
        if os.environ["RANK"] == "1":
            raise SystemExit("before there is a group")
        time.sleep(120)
        (out / "waited").touch()

    monkeypatch.setattr(loop, "train", train)
    stand_in(loop.main)
    with pytest.raises(NvilaError, match="SystemExit: before there is a group"):
        launching.launch(job)
    assert not (out / "waited").exists()


@pytest.mark.slow
def test_an_error_of_one_process_in_a_step_is_the_jobs(
    make_job: MakeJob, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The others lose it in a collective, and "Connection closed by peer" is not what has happened."""
    from nvila.components.model.nvila import NVILA

    forward = NVILA.forward

    def fall(self: NVILA, *args: object, **options: object) -> object:
        if os.environ["RANK"] == "1":
            raise RuntimeError("out of memory in the second process")
        return forward(self, *args, **options)  # type: ignore[arg-type]

    monkeypatch.delenv("DS_LOG_LEVEL", raising=False)
    monkeypatch.setattr(NVILA, "forward", fall)
    with pytest.raises(NvilaError, match="RuntimeError: out of memory in the second process"):
        launching.launch(make_job("a", run={"gpus": 2, "zero": 3}))
    assert "in fall" in capfd.readouterr().err  # where, in the log


def test_an_old_verdict_is_not_believed(make_job: MakeJob, stand_in: Callable[[Work], None]) -> None:
    """The reason of an earlier attempt must not explain the failure of this one."""
    job = make_job("a")
    Path(job.out, "verdict.json").write_text(json.dumps(to_record(DataError("old"))))
    stand_in(lambda path: sys.exit(1))
    with pytest.raises(TrainingError, match="no message"):
        launching.launch(job)


def test_every_process_knows_its_place(make_job: MakeJob, stand_in: Callable[[Work], None]) -> None:
    """Two processes that both think they are the first train two models and write one folder."""
    job = make_job("a", run={"gpus": 2})

    def note(path: str) -> None:
        names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
        place = [os.environ[name] for name in names]
        Path(path).with_name(f"place-{place[0]}").write_text(" ".join(place[1:]))

    stand_in(note)
    launching.launch(job)
    first, second = (Path(job.out, f"place-{rank}").read_text().split() for rank in (0, 1))
    assert (first[0], second[0], first[1]) == ("0", "1", "2") and first[1:] == second[1:]
    assert "RANK" not in os.environ


def test_a_store_of_an_earlier_meeting_does_not_hold_a_process_up(
    make_job: MakeJob, stand_in: Callable[[Work], None]
) -> None:
    """Its destructor joins a thread; a forked process has another in its place, and fails or waits for ever."""
    from torch.distributed import TCPStore

    def collect(path: str) -> None:
        signal.alarm(20)
        for _ in range(3):
            threading.Thread(target=time.sleep, args=(60,), daemon=True).start()
        gc.collect()

    stand_in(collect)
    left: list[object] = [TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)]
    left.append(left)
    gc.disable()  # or chance decides whose collector finds it
    try:
        del left
        launching.launch(make_job("a"))
    finally:
        gc.enable()


def test_the_workers_own_words_arrive(make_job: MakeJob, capfd: pytest.CaptureFixture[str]) -> None:
    """A missing picture reported as a crash of torchrun is retried for nothing."""
    job = make_job("a", stage={"data": {"colours.sft": 1, "nowhere.sft": 1}})
    with pytest.raises(DataError, match=r"no samples in nowhere\.sft") as caught:
        launching.launch(job)
    assert caught.value.exit_code == Exit.USER
    assert "no samples in nowhere.sft" in capfd.readouterr().err


def test_an_error_that_is_none_of_ours_arrives_too(make_job: MakeJob) -> None:
    """A full disk reported as a process that ended without a word; and what was half written keeps it full."""
    job = make_job("a", run={"checkpoint_seconds": 0.0})
    Path(job.out, "checkpoints").touch()
    Path(job.out, "model.partial", "llm").mkdir(parents=True)
    with pytest.raises(NvilaError, match=r"(NotADirectory|FileExists)Error.*checkpoints.*MiB left") as caught:
        launching.launch(job)
    assert "no message" not in str(caught.value) and not Path(job.out, "model.partial").exists()
