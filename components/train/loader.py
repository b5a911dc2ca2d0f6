"""Makes a stage's batches in a process of its own, ahead of the model's need."""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import islice
from multiprocessing.connection import Connection

import torch

from nvila.components.contracts.children import die_with_parent, forking, how_ended
from nvila.components.contracts.errors import NvilaError
from nvila.components.contracts.text import say
from nvila.components.data.samples import Sample
from nvila.components.model.batch import Batch
from nvila.components.model.feed import Feed
from nvila.components.model.vision.preprocess import BlockSize, Kind, Visual

AHEAD = 8
"""Batches that are made before the first is taken, and kept at that."""
SAY_SECONDS = 60.0
"""How often a wait is told of."""
STALL_SECONDS = 1200.0
"""How long one batch may take. Less than processes wait for each other (`PEER_SECONDS`): the one that knows speaks."""


class Loader:
    """The process. It waits until `batches` says which, and ends with the context.

    Make it before anything starts threads, a process group above all: it is forked (what has been imported and read
    is there at once), and a lock that another thread holds at that moment is never released in a fork.
    """

    def __init__(self, feed: Feed, samples: Sequence[Sample], batch: int) -> None:
        self._feed, self._samples, self._batch = feed, samples, batch
        context = multiprocessing.get_context("fork")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=self._work, args=(theirs, os.getpid()), daemon=True)
        with forking():
            self._process.start()
        theirs.close()

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, *_: object) -> None:
        self._pipe.close()
        self._process.kill()
        self._process.join()

    def batches(self, start: int = 0) -> Iterator[Batch]:
        """Consecutive batches of the samples, the first `start` left out.

        Raises:
            NvilaError: of a batch that cannot be made; the process is lost, or has been silent for too long.
        """
        numbers = range(start, -(-len(self._samples) // self._batch))
        ahead = iter(numbers)
        for number in islice(ahead, AHEAD):
            self._ask(number)
        for number in numbers:
            made = self._receive(number)
            if (further := next(ahead, None)) is not None:
                self._ask(further)
            if isinstance(made, NvilaError):
                raise made
            yield made.unpack()

    def _ask(self, number: int) -> None:
        with suppress(ConnectionError):  # a lost process is named where its batch is received
            self._pipe.send(number)

    def _receive(self, number: int) -> _Packed | NvilaError:
        began = time.monotonic()
        while not self._pipe.poll(SAY_SECONDS):
            waited = time.monotonic() - began
            at = f"process {self._process.pid}, samples from {self._of(number)[0].id}"
            os.kill(self._process.pid or 0, signal.SIGUSR1)
            if waited > STALL_SECONDS:
                raise NvilaError(
                    f"the data loader has made no batch for {waited:.0f} s",
                    where=at,
                    do="Its stack is above in the log: a file that does not answer, or a lock. A new run resumes",
                )
            say(f"waiting for the data loader since {waited:.0f} s ({at})")
        try:
            return self._pipe.recv()  # type: ignore[no-any-return]
        except (EOFError, OSError):
            self._process.join()
            raise NvilaError(
                f"the data loader {how_ended(self._process.exitcode)}",
                where=f"samples from {self._of(number)[0].id}",
                do="Look above in the log. Run again and it resumes",
            ) from None

    def _of(self, number: int) -> Sequence[Sample]:
        return self._samples[number * self._batch : (number + 1) * self._batch]

    def _work(self, pipe: Connection, parent: int) -> None:
        """In the process: make what is asked for, until nobody is there to ask."""
        # A stop sent to the whole process group is for the parent, which still needs batches to end its step.
        for stop in (signal.SIGTERM, signal.SIGINT):
            signal.signal(stop, signal.SIG_IGN)
        die_with_parent(parent, signal.SIGKILL)
        faulthandler.register(signal.SIGUSR1, file=2)
        self._pipe.close()
        torch.set_num_threads(1)
        with suppress(EOFError, ConnectionError):
            while True:
                pipe.send(self._make(pipe.recv()))

    def _make(self, number: int) -> _Packed | NvilaError:
        try:
            return _Packed.of(self._feed.batch(self._of(number)))
        except NvilaError as error:
            return error


@dataclass(frozen=True)
class _Packed:
    """A batch with all tiles in one tensor: every tensor that waits in another process holds file descriptors."""

    batch: Batch
    """Without visuals."""
    tiles: torch.Tensor
    visuals: list[tuple[Kind, BlockSize | None, int]]
    """Kind, block size and number of tiles of each."""

    @classmethod
    def of(cls, batch: Batch) -> _Packed:
        tiles = [visual.tiles for visual in batch.visuals]
        return cls(
            replace(batch, visuals=[]),
            torch.cat(tiles) if tiles else torch.empty(0),
            [(visual.kind, visual.block_size, len(visual.tiles)) for visual in batch.visuals],
        )

    def unpack(self) -> Batch:
        parts = self.tiles.split([count for *_, count in self.visuals]) if self.visuals else ()
        pairs = zip(self.visuals, parts, strict=True)
        return replace(self.batch, visuals=[Visual(kind, part, size) for (kind, size, _), part in pairs])
