"""Batches out of the loader's process."""

from __future__ import annotations

import gc
import os
import resource
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from nvila.components.contracts.errors import NvilaError
from nvila.components.data.samples import Sample, read_samples
from nvila.components.model.checkpoint.native import read_config
from nvila.components.model.feed import Feed
from nvila.components.model.text.tokenizer import load_tokenizer
from nvila.components.train import loader as loading
from nvila.components.train.job import Job
from nvila.components.train.loader import Loader


@pytest.fixture
def feed(small: Any) -> Feed:
    folder = small.model.dir("model")
    return Feed(load_tokenizer(folder / "llm"), read_config(folder))


@pytest.fixture
def samples(small: Any) -> list[Sample]:
    return read_samples(small.samples.path("samples.parquet"), split="sft")


@pytest.fixture
def few_descriptors() -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(list(Path("/proc/self/fd").iterdir())) + 100, hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def child() -> psutil.Process:
    """The loader's process, which is the newest."""
    return max(psutil.Process().children(), key=lambda process: process.create_time())


def catches(process: psutil.Process, number: signal.Signals) -> bool:
    status = Path(f"/proc/{process.pid}/status").read_text().splitlines()
    caught = next(line.split()[1] for line in status if line.startswith("SigCgt"))
    return bool(int(caught, 16) >> number - 1 & 1)


@pytest.mark.usefixtures("few_descriptors")
def test_many_pictures_fit_a_common_limit_of_open_files(feed: Feed, small: Any) -> None:
    """Every tensor on its way between processes holds a descriptor: one a picture breaks Debian's limit of 1024."""
    pictures = read_samples(small.samples.path("samples.parquet"), split="sft", sources=["colours"]) * 40
    with Loader(feed, pictures, 64) as loader:
        steps = loader.steps()
        found = len([item for ready in next(steps) for item in ready.items])
        time.sleep(1.0)  # the other process is as far ahead as it may be
        assert found + sum(len(ready.items) for step in steps for ready in step) == 960


@pytest.mark.parametrize("processes", [1, 3])
def test_samples_are_those_that_the_feed_makes(feed: Feed, samples: list[Sample], processes: int) -> None:
    """Tiles that end up at another sample's marker train the wrong answers without any error; and with another number
    of processes a resumed stage must go on with the same bytes."""
    wanted = feed.items(samples[20:])[0]
    with Loader(feed, samples, 20, processes) as loader:
        loader.begin(0)  # as where the newest checkpoint turns out to be spoilt
        found = [ready for step in loader.steps(1) for ready in step]
    assert [name for ready in found for name in ready.names] == [name for name, _ in wanted]
    items = [item for ready in found for item in ready.items]
    for (encoded, visuals), (_, (theirs, tiles)) in zip(items, wanted, strict=True):
        assert encoded == theirs
        assert [(v.kind, v.block_size) for v in visuals] == [(v.kind, v.block_size) for v in tiles]
        assert all(torch.equal(a.tiles, b.tiles) for a, b in zip(visuals, tiles, strict=True))
    assert [length for ready in found for length in ready.lengths] == [feed.length(item) for _, item in wanted]
    assert loader.waited_seconds > 0


class Group:
    """As a process group: taking it down needs threads that only the process which made it has."""

    def __init__(self) -> None:
        self.itself, self.process = self, os.getpid()

    def __del__(self) -> None:
        if os.getpid() != self.process:
            os.abort()


def test_what_its_parent_has_dropped_is_not_taken_down_in_it(
    feed: Feed, samples: list[Sample], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A dropped process group that the collector of the loader's process meets waits there for threads that do not
    exist: for ever, or until it aborts."""
    before = Feed.items
    monkeypatch.setattr(Feed, "items", lambda *given: (gc.collect(), before(*given))[1])
    gc.disable()
    try:
        Group()
        with Loader(feed, samples, 8) as loader:
            assert len(next(next(loader.steps())).items) == 8
    finally:
        gc.enable()
    assert gc.get_freeze_count() == 0


@pytest.mark.usefixtures("one_rank")
def test_it_is_there_before_anything_starts_threads(
    make_job: Callable[..., Job], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A lock that a thread (of gloo, of CUDA) holds while the process is forked is never released in it: training
    would wait for its first batch for ever."""
    from nvila.components.model.checkpoint import native
    from nvila.components.train.loop import train

    class Enough(Exception):
        pass

    def load(*_: object, **__: object) -> None:
        raise Enough(child().name())

    monkeypatch.setattr(native, "load_opened", load)
    before = psutil.Process().children()
    with pytest.raises(Enough):
        train(make_job("a"), None)  # type: ignore[arg-type]
    assert psutil.Process().children() == before


@pytest.mark.parametrize("stop", [signal.SIGSTOP, signal.SIGKILL])
def test_a_process_that_is_silent_or_lost_is_named(
    feed: Feed,
    samples: list[Sample],
    stop: signal.Signals,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A GPU machine that waits for a batch for ever costs as much as one that trains."""
    monkeypatch.setattr(loading, "SAY_SECONDS", 0.3)
    words = r"nothing ready for \d+ s" if stop == signal.SIGSTOP else "killed by signal 9"
    with Loader(feed, samples, 8, seconds=3.0) as loader:
        process = child()
        process.send_signal(stop)
        with pytest.raises(NvilaError, match=f"{samples[0].id}.*{words}"):
            next(next(loader.steps()))
    assert stop == signal.SIGKILL or "waiting for a data loader" in capsys.readouterr().err
    assert not process.is_running()


def test_a_process_that_was_lost_before_it_is_asked_is_named(feed: Feed, samples: list[Sample]) -> None:
    """It is lost while weights are loaded, too little memory being the usual reason: "Broken pipe" names neither."""
    with Loader(feed, samples, 8) as loader:
        child().kill()
        loader._workers[0]._process.join(20)
        with pytest.raises(NvilaError, match=f"{samples[0].id}.*killed by signal 9"):
            next(next(loader.steps()))


def test_a_slow_sample_is_named_and_shows_where_it_is(
    feed: Feed, samples: list[Sample], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Of a file system that does not answer nobody sees anything but a run that stands still."""
    monkeypatch.setattr(loading, "SAY_SECONDS", 0.3)
    items, slow = Feed.items, samples[5].id
    monkeypatch.setattr(Feed, "items", lambda self, some: time.sleep(60) if some[0].id == slow else items(self, some))
    with Loader(feed, samples, 8, processes=2, seconds=3.0) as loader:
        deadline = time.monotonic() + 60
        while not catches(child(), signal.SIGUSR1):
            assert time.monotonic() < deadline, "no handler that shows the stack"
            time.sleep(0.05)
        with pytest.raises(NvilaError, match=f"{slow}.*Its stack is above"):
            next(next(loader.steps()))
    assert "in _make" in capfd.readouterr().err


def test_it_outlasts_a_stop_and_not_its_parent(feed: Feed, samples: list[Sample]) -> None:
    """Ctrl-C reaches every process: the step under way still needs its samples. And an orphan would wait for ever."""
    loader = Loader(feed, samples, 8)
    process = child()
    steps = loader.steps()
    list(next(steps))
    for number in (signal.SIGTERM, signal.SIGINT):
        os.kill(process.pid, number)
    assert len([list(step) for step in steps]) == -(-len(samples) // 8) - 1
    worker = loader._workers[0]
    worker._pipe.close()
    worker._process.join(20)
    assert worker._process.exitcode == 0
