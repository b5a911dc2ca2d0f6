"""Measures a stage while it trains: speed, work, waiting, padding, memory, energy.

Every process counts its share of a step; rank 0 writes `meter.jsonl` and says how it goes. What the numbers mean stands
in `contracts.meter`, the formula of the work in `model.work`.
"""

from __future__ import annotations

import json
import resource
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from nvila.components.contracts.environment import Environment
from nvila.components.contracts.gpus import gpu_of
from nvila.components.contracts.meter import METER, Attempt, Rates, Reading, rates
from nvila.components.contracts.precisions import PRECISIONS
from nvila.components.contracts.text import duration
from nvila.components.model.positions import positions
from nvila.components.model.shape import count
from nvila.components.model.vision.s2 import tiles_per_unit
from nvila.components.model.vision.visual import token_count
from nvila.components.model.work import Load, operations
from nvila.components.train.energy import Energy
from nvila.components.train.job import Job
from nvila.components.train.profiling import Profile
from nvila.components.train.trainer_status import TrainerStatus

if TYPE_CHECKING:
    from nvila.components.model.batch import Batch
    from nvila.components.model.config.config import ModelConfig
    from nvila.components.model.nvila import NVILA
    from nvila.components.model.text.tokenizer import TokenIds
    from nvila.components.train.engine import Engine

READING_SECONDS = 2.0
"""Between two readings at first; later a thousandth of the time that has passed, so that a week's file stays small."""


@dataclass
class Counted:
    """What one process, or all of them together, have seen of a step; numbers that may be added."""

    samples: float = 0
    places: float = 0
    """Positions of the decoder, padding included."""
    tiles: float = 0
    projected: float = 0
    positions: float = 0
    pairs: float = 0
    waited_seconds: float = 0
    joules: float = 0

    def add(self, numbers: Sequence[float]) -> None:
        """Add these to the fields, in their order."""
        for one, number in zip(fields(self), numbers, strict=True):
            setattr(self, one.name, getattr(self, one.name) + number)

    def load(self, predicted: float) -> Load:
        """What the model computed of it, with so many supervised tokens."""
        return Load(self.tiles, self.projected, self.positions, self.pairs, predicted)


class Meter:
    """The measures of one attempt at a stage."""

    def __init__(self, job: Job, model: NVILA, engine: Engine, began: float, left: int, here: Environment) -> None:
        """`began` is when the process did, by `time.monotonic`; `left` optimizer steps are to come."""
        self._shape, self._stage = count(model.config), job.stage
        self._tokens, self._engine, self._began = model.tokens, engine, began
        self._energy = Energy(engine.device)
        self._mine, self._all = Counted(), Counted()
        self._products = PRECISIONS[job.run.precision].products
        self._file = Path(job.out, METER) if engine.rank == 0 else None
        self._loss = self._supervised = 0.0
        self._steps = 0
        self._last: Rates | None = None
        self._status = TrainerStatus(here) if self._file and here.trainer_status_url else None
        profiled = left and self._file and here.profile in ("all", self._file.parent.parent.name)  # store/STEP/KEY/
        self._profile = Profile(Path(job.out), left) if profiled else None

    def fed(self, steps: Iterator[Iterator[Batch]]) -> Iterator[Iterator[Batch]]:
        """The passes of each step, counted, with the time that each is waited for."""
        self._start = self._read = time.monotonic()
        self._attempt = self._open()
        return map(self._counted, steps)

    def _counted(self, passes: Iterator[Batch]) -> Iterator[Batch]:
        asked = time.monotonic()
        for batch in passes:
            self._mine.add(astuple(counted(batch, self._shape.config, self._tokens, time.monotonic() - asked)))
            yield batch
            asked = time.monotonic()

    def counts(self) -> list[float]:
        """What this process has seen since it was asked last, to be added to what the others have."""
        self._mine.joules += self._energy.joules()
        numbers, self._mine = [*astuple(self._mine)], Counted()
        return numbers

    def step(self, step: int, left: int, loss: float, supervised: float, rate: float, counts: Sequence[float]) -> str:
        """Take the optimizer's step that all processes have counted this of.

        Args:
            step: its number.
            left: steps to come.
            loss: summed over its supervised tokens.
            supervised: their number.
            rate: its learning rate.
            counts: the sum over all processes of `counts`.

        Returns:
            How it goes, in words.
        """
        self._all.add(counts)
        self._loss += loss
        self._supervised += supervised
        self._steps += 1
        now = time.monotonic()
        seconds_left = (now - self._start) / self._steps * left
        if self._file and (not left or now - self._read > max(READING_SECONDS, (now - self._start) / 1000)):
            reading = self._reading(step, rate, now - self._read)
            self._last = rates([(self._attempt, reading)])
            _append(self._file, json.dumps(reading.model_dump() | self._last.model_dump()))
            self._tell(reading, step / (step + left), seconds_left)
            self._all, self._loss, self._supervised, self._read = Counted(), 0.0, 0.0, now
        if self._profile:
            self._profile.step()
        said = [f"loss {loss / supervised:.3f}" if supervised else "no usable sample"]
        if left:
            said.append(f"{duration(seconds_left)} left")
        return ", ".join([*said, *(self._last.words if self._last else []), f"lr {rate:.1e}"])

    def _tell(self, reading: Reading, share: float, seconds_left: float) -> None:
        """Kubeflow Trainer, where it asks."""
        if self._status:
            told = {"loss": reading.loss, "learning_rate": reading.lr, "step": reading.step}
            every = told | (self._last.model_dump() if self._last else {})
            self._status.tell(share, seconds_left, {n: value for n, value in every.items() if value is not None})
            if share == 1:
                self._status.close()

    def _open(self) -> Attempt:
        device = self._engine.device
        product = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
        gpu = gpu_of(product)
        attempt = Attempt(
            began=time.time() - (self._start - self._began),
            startup_seconds=self._start - self._began,
            processes=self._engine.world,
            device=product,
            peak_flops=getattr(gpu, self._products) if gpu else None,
        )
        if self._file:
            _append(self._file, attempt.model_dump_json())
        return attempt

    def _reading(self, step: int, rate: float, seconds: float) -> Reading:
        seen = self._all
        return Reading(
            time=time.time(),
            step=step,
            seconds=seconds,
            loss=self._loss / self._supervised if self._supervised else None,
            lr=rate,
            samples=int(seen.samples),
            tokens=int(seen.positions),
            places=int(seen.places),
            operations=operations(self._shape, self._stage, seen.load(self._supervised)),
            waited_seconds=seen.waited_seconds,
            rss_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
            gpu_bytes=torch.cuda.max_memory_allocated(self._engine.device) if self._attempt.on_gpu else None,
            joules=seen.joules if self._energy.told else None,
        )


def counted(batch: Batch, config: ModelConfig, tokens: TokenIds, waited_seconds: float = 0) -> Counted:
    """What a batch makes the model compute."""
    lengths = batch.lengths or _lengths(batch, config, tokens)
    shapes = Counter((visual.block_size, len(visual.tiles)) for visual in batch.visuals)
    units = [(block, each * (tiles // tiles_per_unit(block, config))) for (block, tiles), each in shapes.items()]
    return Counted(
        samples=len(batch.samples),
        places=batch.computed or len(lengths) * max(lengths),
        tiles=sum(len(visual.tiles) for visual in batch.visuals),
        projected=sum(number * (token_count("image", block, 1, config) - 1) for block, number in units),
        positions=sum(lengths),
        pairs=sum(length**2 for length in lengths) / 2,
        waited_seconds=waited_seconds,
    )


def _lengths(batch: Batch, config: ModelConfig, tokens: TokenIds) -> list[int]:
    visuals, lengths = iter(batch.visuals), []
    for ids, mask in zip(batch.input_ids, batch.attention_mask, strict=True):
        row = ids[mask.bool()].tolist()
        shown = [next(visuals) for token in row if token in (tokens.image, tokens.video)]
        lengths.append(min(positions(row, shown, config, tokens), config.max_length_tokens))
    return lengths


def _append(path: Path, line: str) -> None:
    with path.open("a", encoding="utf-8") as stream:
        stream.write(line + "\n")
