"""Checkpoints that are written while training goes on."""

from __future__ import annotations

import errno
import hashlib
import shutil
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from test_worker import Stop, losses

from nvila.components.contracts.errors import NvilaError, Preempted
from nvila.components.train import writer
from nvila.components.train.account import Account
from nvila.components.train.job import Job
from nvila.components.train.loop import train
from nvila.components.train.writer import Writer

MakeJob = Callable[..., Job]


def test_what_is_written_is_of_the_moment_of_the_save(tmp_path: Path) -> None:
    """Weights of one step with moments of the next make a model that no training would."""
    import torch

    weight, tied = torch.arange(6.0).reshape(2, 3).t(), torch.ones(3)
    state = {"module": {"a": tied, "b": tied, "w": weight}, "groups": [{"lr": 0.5, "moments": (weight * 2,)}], "n": 1}
    taker = Writer()
    taker.take(state, str(tmp_path / "states.pt"))
    state["n"] = 2
    written = taker.begin()
    taker.wait_until_copied()
    weight.zero_()
    tied.zero_()
    [(name, file)] = written.result().items()
    bytes_ = (tmp_path / name).read_bytes()
    assert (file.size_bytes, file.sha256) == (len(bytes_), hashlib.sha256(bytes_).hexdigest())
    found = torch.load(tmp_path / "states.pt", weights_only=False)
    assert found["n"] == 1 and found["groups"][0]["lr"] == 0.5
    assert found["module"]["w"].equal(torch.arange(6.0).reshape(2, 3).t())
    assert found["groups"][0]["moments"][0].equal(found["module"]["w"] * 2)
    assert found["module"]["a"].data_ptr() == found["module"]["b"].data_ptr() and found["module"]["a"].sum() == 3


def test_copies_are_given_up_by_the_thread_that_wrote_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The update behind a save gave gigabytes back to the system, and training waited for that."""
    import torch

    made, copies = [], writer._copies

    def look(*given: Any) -> dict[Path, Any]:
        states = copies(*given)
        made.extend(weakref.ref(tensor) for state in states.values() for tensor in state.values())
        return states

    monkeypatch.setattr(writer, "_copies", look)
    taker = Writer()
    for name in ("weights.pt", "moments.pt"):
        taker.take({"a": torch.ones(3), "b": torch.zeros(3)}, str(tmp_path / name))
    assert len(taker.begin().result()) == 2
    assert len(made) == 4 and not any(tensor() is not None for tensor in made)


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """A disk that takes no file of a checkpoint before the event is set."""
    free, write = threading.Event(), writer._write
    monkeypatch.setattr(writer, "_write", lambda copied: (free.wait(60), write(copied))[1])
    return free


@pytest.mark.usefixtures("one_rank")
def test_training_goes_on_while_a_checkpoint_is_written(
    make_job: MakeJob, held: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Minutes for each checkpoint in which hundreds of GPUs wait for a file server."""
    take = Account.step

    def step(account: Account, *given: Any) -> Any:
        if account.done == 3:
            assert not list(Path(job.out, "checkpoints").glob("step-*"))
            held.set()
        stopping, _ = take(account, *given)
        return stopping, account.done == 1  # when a checkpoint is due

    monkeypatch.setattr(Account, "step", step)
    job = make_job("a")
    train(job, Stop())
    assert [path.name for path in Path(job.out, "checkpoints").glob("step-*")] == ["step-1"]
    assert len(losses(job)) == 6


@pytest.mark.usefixtures("one_rank")
def test_a_request_to_stop_waits_for_the_disk(make_job: MakeJob, held: threading.Event) -> None:
    """A stop while a checkpoint is being written ended with that one half on the disk, and without its own."""
    job = make_job("a", run={"checkpoint_seconds": 0.0})
    threading.Timer(0.5, held.set).start()
    with pytest.raises(Preempted):
        train(job, Stop(after=2))
    names = {path.name for path in Path(job.out, "checkpoints").iterdir()}
    assert {"step-1", "step-2"} <= names and not any(name.startswith("partial") for name in names)


@contextmanager
def _full_disk(out: Path) -> Iterator[None]:
    """No file of a checkpoint has room after the first step."""
    real = writer._Hashed.write

    def write(stream: Any, data: Any) -> int:
        if (out / "checkpoints" / "latest").exists():
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(stream, data)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(writer._Hashed, "write", write)
        yield


@contextmanager
def _gone(out: Path) -> Iterator[None]:
    """The store is away after the first step."""
    write = writer._write

    def first(copied: Any) -> Any:
        states = copied.result()
        if (out / "checkpoints" / "latest").exists():
            shutil.rmtree(next(iter(states)).parent)
        return write(copied)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(writer, "_write", first)
        yield


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize(("trouble", "said"), [(_full_disk, "No space left on device"), (_gone, "No such file")])
def test_what_fails_beside_the_loop_ends_it(make_job: MakeJob, trouble: Any, said: str) -> None:
    """A thread that dies alone: training goes on for a week, and nothing of it is kept."""
    job = make_job("a", run={"checkpoint_seconds": 0.0})
    with (
        trouble(Path(job.out)),
        pytest.raises(NvilaError, match=f"could not be written: {said}.* checkpoint step-1") as e,
    ):
        train(job, Stop())
    assert "MiB left" in str(e.value)
    assert {path.name for path in Path(job.out, "checkpoints").iterdir()} == {"best", "latest", "step-1"}
    train(job, Stop())
    assert [step for step, _ in losses(job)] == [1, 2, 3, 4, 5, 6]
