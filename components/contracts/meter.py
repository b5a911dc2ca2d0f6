"""What a training stage measures of itself: the form of `meter.jsonl`, and the rates that follow from it.

Rank 0 writes it: each attempt opens with an `Attempt`, a `Reading` follows every few seconds. The file is no part of a
step's output: it tells of one execution, with the work of attempts that were cut off.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from nvila.components.contracts import jsonlines
from nvila.components.contracts.results.result import Result

METER = "meter.jsonl"


class Attempt(BaseModel):
    """Which processes train, from when on."""

    model_config = ConfigDict(frozen=True)

    began: float
    """Seconds since the epoch."""
    startup_seconds: float
    """Until the first batch was asked for: weights, the engine, a checkpoint."""
    processes: int
    device: str
    """As its driver calls it; `cpu` where there is no GPU."""
    peak_flops: float | None = None
    """Floating-point operations a second that its maker states; None where that is not known."""

    @property
    def on_gpu(self) -> bool:
        """Whether the processes have a GPU each."""
        return self.device != "cpu"


class Reading(BaseModel):
    """The optimizer's steps since the reading before, of all processes together."""

    model_config = ConfigDict(frozen=True)

    time: float
    """Seconds since the epoch."""
    step: int
    """The last of them."""
    seconds: float
    """Of the clock, checkpoints included."""
    loss: float | None
    """Mean over their supervised tokens; None where there was none."""
    lr: float
    """Of the last."""
    samples: int
    tokens: int
    """Positions of the decoder, padding left out."""
    places: int
    """The same with padding."""
    operations: float
    """Floating-point operations of the model, forward and backward; recomputed activations do not count."""
    waited_seconds: float
    """For batches, summed over processes."""
    rss_bytes: int
    """Most memory that the process of rank 0 has held."""
    gpu_bytes: int | None = None
    """Most memory that its tensors have held on its GPU."""
    joules: float | None = None
    """That the GPUs took, as their own counters tell; None where they have none."""


Readings = Sequence[tuple[Attempt, Reading]]
"""In the order of the file, each with its attempt."""


class Rates(Result):
    """How fast it goes, or went."""

    tokens_per_second: float
    samples_per_second: float
    operations_per_second: float
    mfu: float | None
    """Operations a second as a share of what the makers of the GPUs state; None where that is not known."""
    loader_wait: float
    """Share of the time in which a process waits for its batch."""
    padding: float
    """Share of the decoder's positions that is padding."""
    rss_bytes: int
    gpu_bytes: int | None

    @property
    def words(self) -> list[str]:
        """For a person."""
        speed = f"{self.operations_per_second / 1e9:,.1f} GFLOP/s" if self.mfu is None else f"MFU {self.mfu:.0%}"
        return [
            f"{self.tokens_per_second:,.0f} tokens/s",
            f"{self.samples_per_second:,.1f} samples/s",
            speed,
            f"loader wait {self.loader_wait:.1%}",
            f"padding {self.padding:.1%}",
            f"{(self.gpu_bytes or self.rss_bytes) / 2**30:.1f} GiB",
        ]


class Measures(Rates):
    """Of a whole stage, with all attempts at it: from the start of their processes to the last step."""

    gpu_hours: float | None
    """Of the clock, summed over processes; None where they have no GPU."""
    joules: float | None

    @property
    def words(self) -> list[str]:
        """For a person."""
        hours = [] if self.gpu_hours is None else [f"{self.gpu_hours:,.2f} GPU hours"]
        return [*super().words, *hours, *([] if self.joules is None else [f"{self.joules / 3.6e6:,.2f} kWh"])]


def read_meter(path: Path) -> Readings:
    """The readings of a file; none where it is not there."""
    found: list[tuple[Attempt, Reading]] = []
    attempt: Attempt | None = None
    for record in jsonlines.whole(path):
        try:
            if "processes" in record:
                attempt = Attempt.model_validate(record)
            elif attempt:
                found.append((attempt, Reading.model_validate(record)))
        except ValidationError:  # of another version: no result depends on it
            continue
    return found


def rates(read: Readings) -> Rates:
    """Of at least one reading."""
    seconds = max(sum(one.seconds for _, one in read), 1e-9)
    operations = sum(one.operations for _, one in read)
    peak = sum((attempt.peak_flops or 0) * attempt.processes * one.seconds for attempt, one in read)
    known = peak > 0 and all(attempt.peak_flops for attempt, _ in read)
    tokens, places = (sum(getattr(one, name) for _, one in read) for name in ("tokens", "places"))
    waited = sum(one.waited_seconds for _, one in read)
    return Rates(
        tokens_per_second=tokens / seconds,
        samples_per_second=sum(one.samples for _, one in read) / seconds,
        operations_per_second=operations / seconds,
        mfu=operations / peak if known else None,
        loader_wait=waited / max(sum(attempt.processes * one.seconds for attempt, one in read), 1e-9),
        padding=1 - tokens / places if places else 0.0,
        rss_bytes=max(one.rss_bytes for _, one in read),
        gpu_bytes=max((one.gpu_bytes for _, one in read if one.gpu_bytes is not None), default=None),
    )


def measures(path: Path) -> Measures | None:
    """Of the stage that wrote this file; None where there is none."""
    read = read_meter(path)
    if not read:
        return None
    attempts = dict.fromkeys(attempt for attempt, _ in read)
    seconds = sum(attempt.processes * attempt.startup_seconds for attempt in attempts)
    seconds += sum(attempt.processes * one.seconds for attempt, one in read)
    joules = [one.joules for _, one in read if one.joules is not None]
    return Measures(
        **rates(read).model_dump(),
        gpu_hours=seconds / 3600 if all(attempt.on_gpu for attempt in attempts) else None,
        joules=sum(joules) if joules else None,
    )
