"""What a stage's optimizer steps were of: losses and tokens of all processes, samples left out, and what went wrong."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from nvila.components.contracts.errors import TrainingError
from nvila.components.contracts.progress import Progress
from nvila.components.data.skipped import Skipped, Tally
from nvila.components.train.job import Job
from nvila.components.train.losses import LOSSES, SKIPPED, StepLog, read_log

if TYPE_CHECKING:
    import torch

    from nvila.components.model.batch import Batch
    from nvila.components.train.engine import Engine
    from nvila.components.train.meter import Meter

SUSPECTS = 10
"""Samples that an error names."""


@dataclass
class Share:
    """What one process has seen of a global batch."""

    losses: list[torch.Tensor] = field(default_factory=list)
    """Of each micro batch, summed over its supervised tokens; left on the device until the step."""
    samples: list[tuple[str, ...]] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)
    supervised: int = 0
    tokens: int = 0

    def add(self, batch: Batch, loss: torch.Tensor, supervised: int) -> None:
        """Add a micro batch."""
        self.losses.append(loss)
        self.samples.append(batch.samples)
        self.skipped += batch.skipped
        self.supervised += supervised
        self.tokens += int(batch.attention_mask.sum()) if batch.samples else 0

    def suspects(self) -> list[str]:
        """Samples of micro batches whose loss is not finite."""
        micro = zip(self.samples, self.losses, strict=True)
        return [sample for samples, loss in micro if not bool(loss.isfinite()) for sample in samples]


class Account:
    """Takes the optimizer's steps of a stage and writes them down. Every process keeps one; rank 0 writes."""

    def __init__(self, engine: Engine, job: Job, samples: list[str], done: int, meter: Meter) -> None:
        """`samples` are the ids of the stage in its order, of which `done` optimizer steps lie behind."""
        out, first, what = Path(job.out), engine.rank == 0, f"stage {job.stage.name}"
        self.done, self.total = done, len(samples) // job.stage.batch
        self._engine, self._samples, self._batch, self._stage = engine, samples, job.stage.batch, job.stage
        self._meter = meter
        self._tally = Tally(what, len(set(samples)), job.run.max_skipped_share, quiet=not first)
        self._tally.add(engine.gather(read_skipped(out / SKIPPED) if first else []))
        self._logs = [StepLog(out / name) for name in (LOSSES, SKIPPED)] if first else []
        self._progress = Progress(what, self.total) if first else None
        self._show(done)

    def step(self, share: Share, *flags: bool) -> list[bool]:
        """Take the step of a global batch, of which this process has seen `share`.

        Returns:
            Each flag as any process has it: what all must do together (save, stop) is decided by all together.

        Raises:
            TrainingError: the loss or a gradient is not finite; no weight has changed.
            DataError: too many samples cannot be used.
        """
        engine, rate = self._engine, self._engine.learning_rate
        own = sum(loss.item() for loss in share.losses)
        seen = (own, share.supervised, share.tokens, len(share.skipped))
        counts = self._meter.counts()
        loss, supervised, tokens, skipped, *joint = engine.total(*seen, *flags, *counts)
        if skipped:
            self._skip(engine.gather(share.skipped))
        if not math.isfinite(loss):
            raise self._not_finite("the loss is not finite", loss, engine.gather(share.suspects()))
        if not engine.step(int(supervised)):
            batch = self._samples[self.done * self._batch : (self.done + 1) * self._batch]
            raise self._not_finite("the gradients are not finite", None, batch)
        self.done += 1
        mean = loss / supervised if supervised else None
        if self._logs:
            record = {"loss": None if mean is None else round(mean, 6), "lr": rate} | self._own_rates(rate)
            self._logs[0].write(step=self.done, **record, tokens=int(tokens))
        flags_of_all, counts = joint[: len(flags)], joint[len(flags) :]
        self._show(1, self._meter.step(self.done, self.total - self.done, loss, supervised, rate, counts))
        return [flag > 0 for flag in flags_of_all]

    def save(self, folder: Path) -> None:
        """Write a checkpoint, the logs in it.

        Raises:
            TrainingError: a weight is not finite.
        """
        self.check_weights()
        self._engine.save(folder, self.done, [log.path for log in self._logs])

    def check_weights(self) -> None:
        """What is not finite must not be written.

        Raises:
            TrainingError: a weight is not finite.
        """
        if names := self._engine.not_finite():
            raise self._not_finite("weights are not finite", names[:3], [])

    def _own_rates(self, rate: float) -> dict[str, dict[str, float]]:
        """Rates of the parts that have one of their own, where the stage's is at `rate`: one schedule moves all."""
        stage = self._stage
        of = {str(part): peak * rate / stage.learning_rate for part, peak in stage.learning_rates.items()}
        return {"lr_of": of} if of else {}

    def _skip(self, skipped: list[Skipped]) -> None:
        for one in skipped if self._logs else ():
            self._logs[1].write(step=self.done + 1, **asdict(one))
        self._tally.add(skipped)

    def _show(self, steps: int, note: str = "") -> None:
        if self._progress:
            self._progress.update(steps, note)

    def _not_finite(self, what: str, value: object, suspects: list[str]) -> TrainingError:
        named = ", ".join(suspects[:SUSPECTS]) + (", ..." if len(suspects) > SUSPECTS else "")
        return TrainingError(
            what,
            where=f"optimizer step {self.done}",
            value=value,
            do="Lower the stage's learning_rate or set clip_norm; the last checkpoint is kept"
            + (f". Look at these samples: {named}" if named else ""),
        )


def read_skipped(path: Path) -> list[Skipped]:
    """Samples that a stage has left out."""
    return [Skipped(str(record.get("id")), str(record.get("reason")), record.get("where")) for record in read_log(path)]
