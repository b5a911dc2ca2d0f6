"""Makes a stage's samples ready in processes of their own, ahead of the model's need."""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import shutil
import signal
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import islice
from multiprocessing.connection import Connection
from typing import Any

import torch

from nvila.components.contracts.children import die_with_parent, forking, how_ended
from nvila.components.contracts.environment import before_importing
from nvila.components.contracts.errors import NvilaError
from nvila.components.contracts.text import say
from nvila.components.data.samples import Sample
from nvila.components.data.skipped import Skipped
from nvila.components.model.feed import Feed, Item
from nvila.components.model.text.conversation import Encoded
from nvila.components.model.vision.preprocess import BlockSize, Kind, Visual

CHUNK = 16
"""Samples that a process makes ready at a time, and hands over together."""
AHEAD_CHUNKS, AHEAD_BYTES = 64, 512 * 2**20
"""What all processes together keep ready; a whole global batch in any case."""
RECEIVED_CHUNKS = 4
"""What lies in the training process already: to take a chunk over costs milliseconds in which the other process has to
find time too, and a thread does it beside the model."""
SHARED = "/dev/shm"
"""Where tensors lie that go from process to process; a container may have little of it."""
SAY_SECONDS = 60.0
"""How often a wait is told of."""
STALL_SECONDS = 1200.0
"""How long samples that go together may take, unless a recipe says it. Less than processes wait for each other
(`PEER_SECONDS`): the one that knows speaks."""


@dataclass(frozen=True)
class Ready:
    """Samples that can go through the model."""

    names: list[str] = field(default_factory=list)
    items: list[Item] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    """Positions of each in the decoder."""
    skipped: list[Skipped] = field(default_factory=list)
    """Samples that cannot be used."""


class Loader:
    """The processes. They wait until `begin` or `steps` says where, and end with the context.

    Make it before anything starts threads, a process group above all: they are forked (what has been imported and read
    is there at once), and a lock that another thread holds at that moment is never released in a fork.
    """

    def __init__(
        self, feed: Feed, samples: Sequence[Sample], batch: int, processes: int = 1, seconds: float = STALL_SECONDS
    ) -> None:
        """`batch` of the samples are a step's; of any of them no process may be silent for more than `seconds`."""
        self.waited_seconds = 0.0
        """How long the model has waited for samples."""
        self._feed, self._samples, self._batch, self._seconds = feed, samples, batch, seconds
        self._chunk = min(CHUNK, batch)
        self._parts = -(-batch // self._chunk)
        self._start: int | None = None
        self._receiver = ThreadPoolExecutor(1, "loader")
        self._coming: deque[Future[Ready]] = deque()
        self._workers: list[_Worker] = []
        for index in range(processes):
            self._workers.append(_Worker(self, index, processes))

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, *_: object) -> None:
        for one in self._coming:
            one.cancel()
        for worker in self._workers:
            worker.end()
        self._receiver.shutdown()  # the one that waits for a chunk has seen that its process is gone
        for worker in self._workers:
            worker.close()

    def begin(self, step: int) -> None:
        """Have the processes begin at this step; for whoever knows before `steps` where that will probably be."""
        self._start = step * self._parts
        for worker in self._workers:
            worker.tell(self._start)

    def steps(self, start: int = 0) -> Iterator[Iterator[Ready]]:
        """The samples of each step from `start` on, in their order, a few at a time; to be asked for once.

        Raises:
            NvilaError: of samples that cannot be made ready; a process is lost, or has been silent for too long.
        """
        if self._start != start * self._parts:
            self.begin(start)
        numbers = iter(range(start * self._parts, self._chunks))
        for number in islice(numbers, RECEIVED_CHUNKS):
            self._coming.append(self._receiver.submit(self._receive, number))
        for _ in range(start, -(-len(self._samples) // self._batch)):
            yield (self._next(numbers) for _ in range(self._parts))

    def _next(self, numbers: Iterator[int]) -> Ready:
        """The next chunk; those that follow it are asked for."""
        for number in islice(numbers, 1):
            self._coming.append(self._receiver.submit(self._receive, number))
        began = time.monotonic()
        try:
            return self._coming.popleft().result()
        finally:
            self.waited_seconds += time.monotonic() - began

    def _receive(self, number: int) -> Ready:
        worker = self._workers[number % len(self._workers)]
        made = worker.receive(self._start or 0, self._of(number), self._seconds)
        if isinstance(made, NvilaError):
            raise made
        return made.unpack()

    def _of(self, number: int) -> Sequence[Sample]:
        """The samples of a chunk."""
        step, part = divmod(number, self._parts)
        first, end = step * self._batch, min((step + 1) * self._batch, len(self._samples))
        return self._samples[first + part * self._chunk : min(first + (part + 1) * self._chunk, end)]

    @property
    def _chunks(self) -> int:
        return -(-len(self._samples) // self._batch) * self._parts


class _Worker:
    """One of the processes: every so many chunks one is its own."""

    def __init__(self, loader: Loader, index: int, processes: int) -> None:
        self._loader, self._index, self._processes = loader, index, processes
        context = multiprocessing.get_context("fork")
        self._pipe, theirs = context.Pipe()
        self._at = context.RawValue("i", 0)
        """Which sample of its chunk it has in hand."""
        self._process = context.Process(target=self._work, args=(theirs, os.getpid()), daemon=True)
        with forking():
            self._process.start()
        theirs.close()

    def end(self) -> None:
        self._process.kill()
        self._process.join()

    def close(self) -> None:
        self._pipe.close()

    def tell(self, word: int | None) -> None:
        """The chunk to begin at; None for one that has been taken."""
        with suppress(ConnectionError):  # a lost process is named where its samples are received
            self._pipe.send(word)

    def receive(self, start: int, samples: Sequence[Sample], seconds: float) -> _Packed | NvilaError:
        """The next chunk, which is of these samples, made since it was told to begin at `start`."""
        while True:
            self._wait(samples, seconds)
            try:
                began, made = self._pipe.recv()
            except (EOFError, OSError):
                self._process.join()
                raise NvilaError(
                    f"a data loader {how_ended(self._process.exitcode)}",
                    where=f"sample {self._sample(samples)}",
                    do="Look above in the log. Run again and it resumes",
                ) from None
            if began == start:  # else it was told so before it was known where the stage goes on
                self.tell(None)
                return made  # type: ignore[no-any-return]

    def _wait(self, samples: Sequence[Sample], seconds: float) -> None:
        began = time.monotonic()
        while not self._pipe.poll(min(SAY_SECONDS, max(0.0, began + seconds - time.monotonic()))):
            waited = time.monotonic() - began
            at = f"process {self._process.pid}, sample {self._sample(samples)}"
            os.kill(self._process.pid or 0, signal.SIGUSR1)
            if waited >= seconds:
                time.sleep(0.1)  # its stack is to be in the log before it ends
                raise NvilaError(
                    f"a data loader has made nothing ready for {waited:.0f} s",
                    where=at,
                    do="Its stack is above in the log: a file that does not answer, or a lock. A new run resumes",
                )
            say(f"waiting for a data loader since {waited:.0f} s ({at})")

    def _sample(self, samples: Sequence[Sample]) -> str:
        """The one it has in hand."""
        return samples[min(self._at.value, len(samples) - 1)].id

    def _work(self, pipe: Connection, parent: int) -> None:
        """In the process: make chunks ready, as far ahead as is allowed, until nobody is there to take them."""
        # A stop sent to the whole process group is for the parent, which still needs samples to end its step.
        for stop in (signal.SIGTERM, signal.SIGINT):
            signal.signal(stop, signal.SIG_IGN)
        die_with_parent(parent, signal.SIGKILL)
        faulthandler.register(signal.SIGUSR1, file=2)
        for other in (*self._loader._workers, self):
            other._pipe.close()
        torch.set_num_threads(1)
        before_importing("tokenizers in one thread")
        with suppress(EOFError, ConnectionError):
            start = self._told(pipe)
            while True:
                start = self._make_from(pipe, start)

    def _make_from(self, pipe: Connection, start: int) -> int:
        """Make this process's chunks from `start` on; returns where it is to begin next."""
        room = min(AHEAD_BYTES, shutil.disk_usage(SHARED).free // 2) // self._processes
        fewest = -(-self._loader._parts // self._processes)
        most = max(fewest, AHEAD_CHUNKS // self._processes)
        kept: list[int] = []
        first = start + (self._index - start) % self._processes
        for number in range(first, self._loader._chunks, self._processes):
            while len(kept) >= most or (sum(kept) > room and len(kept) >= fewest) or pipe.poll(0):
                if (word := pipe.recv()) is not None:
                    return int(word)
                kept.pop(0)
            made = self._make(number)
            pipe.send((start, made))
            kept.append(made.tiles.nbytes if isinstance(made, _Packed) else 0)
        return self._told(pipe)

    def _told(self, pipe: Connection) -> int:
        while (word := pipe.recv()) is None:
            pass
        return int(word)

    def _make(self, number: int) -> _Packed | NvilaError:
        ready, feed = Ready(), self._loader._feed
        try:
            for at, sample in enumerate(self._loader._of(number)):
                self._at.value = at
                items, skipped = feed.items([sample])
                ready.skipped.extend(skipped)
                for name, item in items:
                    ready.names.append(name)
                    ready.items.append(item)
                    ready.lengths.append(feed.length(item))
            return _Packed.of(ready)
        except NvilaError as error:
            return error


@dataclass(frozen=True)
class _Packed:
    """Samples with all tiles in one tensor: every tensor that waits in another process holds file descriptors."""

    names: list[str]
    encoded: list[Encoded]
    lengths: list[int]
    skipped: list[Skipped]
    tiles: torch.Tensor
    visuals: list[list[tuple[Kind, BlockSize | None, int]]]
    """Kind, block size and number of tiles of each, by sample."""

    @classmethod
    def of(cls, ready: Ready) -> _Packed:
        tiles = [visual.tiles for _, visuals in ready.items for visual in visuals]
        return cls(
            ready.names,
            [encoded for encoded, _ in ready.items],
            ready.lengths,
            ready.skipped,
            torch.cat(tiles) if tiles else torch.empty(0),
            [[(visual.kind, visual.block_size, len(visual.tiles)) for visual in visuals] for _, visuals in ready.items],
        )

    def unpack(self) -> Ready:
        shapes = [shape for shapes in self.visuals for shape in shapes]
        parts: Any = iter(self.tiles.split([count for *_, count in shapes]) if shapes else ())
        visuals = [[Visual(kind, next(parts), size) for kind, size, _ in shapes] for shapes in self.visuals]
        return Ready(self.names, list(zip(self.encoded, visuals, strict=True)), self.lengths, self.skipped)
