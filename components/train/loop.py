"""One training process, started by torchrun (here or on a cluster): load, resume, loop, save."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nvila.components.contracts.environment import Environment, current, entered
from nvila.components.contracts.errors import NvilaError, Preempted, to_record
from nvila.components.contracts.exits import Exit
from nvila.components.contracts.manifest import write_atomic
from nvila.components.contracts.precisions import PRECISIONS
from nvila.components.contracts.sealed import seal
from nvila.components.tracking.redact import tell
from nvila.components.train.checkpoints import clear
from nvila.components.train.engine import Engine, leave, start
from nvila.components.train.job import RECORD, TRAINED, VERDICT, Job

if TYPE_CHECKING:
    from nvila.components.model.batch import Batch
    from nvila.components.model.nvila import NVILA
    from nvila.components.train.account import Account

CHECKPOINTS, PARTIAL = "checkpoints", "model.partial"
"""Folders of an unfinished stage."""
LOST_SECONDS = 1.0
"""Longer than torchrun's agent takes from one look at its processes to the next."""


def main(job_path: str) -> None:
    """Train the stage that the job file describes, from its last checkpoint if there is one."""
    job = Job.model_validate_json(Path(job_path).read_bytes())
    stop = StopRequest()
    try:
        with entered(Environment.read()):
            train(job, stop)
            leave()
    except Exception as caught:
        if isinstance(caught, NvilaError):
            error = caught
        else:
            print(tell(traceback.format_exc()), file=sys.stderr, flush=True)
            left = f"The disk had {shutil.disk_usage(job.out).free >> 20} MiB left"  # torch's own words do not say it
            error = NvilaError(f"{type(caught).__name__}: {caught}", where=job.out, do=left)
            _make_room(caught, Path(job.out))
        print(tell(str(error)), file=sys.stderr, flush=True)
        sys.stdout.flush()
        verdict = Path(job.out, VERDICT)
        with suppress(OSError):  # a disk that is full has been named above
            if not verdict.exists():  # the first process to fail knows why; the others only lost it
                write_atomic(verdict, json.dumps(to_record(error)))
        # Perhaps another was killed: the agent, which names the first, is to see that one first.
        if error is not caught:
            time.sleep(LOST_SECONDS)
        os._exit(int(error.exit_code))  # other ranks may wait in a collective: do not join them


def _make_room(error: Exception, out: Path) -> None:
    """Remove what was half written: where the disk is full, the verdict needs room."""
    caused: BaseException | None = error
    while caused:
        traceback.clear_frames(caused.__traceback__)  # a file that is still open keeps its room
        caused = caused.__context__
    clear(out / CHECKPOINTS)
    shutil.rmtree(out / PARTIAL, ignore_errors=True)


def train(job: Job, stop: StopRequest) -> None:
    """The training loop.

    Raises:
        TrainingError: a loss, a gradient or a weight is not finite.
        DataError: more samples cannot be used than `max_skipped_share` allows.
        Preempted: asked to stop.
    """
    import torch

    from nvila.components.model.checkpoint.native import load_native, read_config
    from nvila.components.model.device import default_device, use_flash_attention
    from nvila.components.model.feed import Feed
    from nvila.components.model.text.tokenizer import load_tokenizer
    from nvila.components.train.account import Account
    from nvila.components.train.data import stage_samples
    from nvila.components.train.loader import Loader
    from nvila.components.train.losses import LOSSES, SKIPPED
    from nvila.components.train.meter import Meter

    began = time.monotonic()
    torch.manual_seed(job.seed)
    out, stage, folder, here = Path(job.out), job.stage, Path(job.model), current()
    samples = stage_samples(stage, Path(job.samples), [Path(k) for k in job.kept], job.seed)
    total = len(samples) // stage.batch
    samples = samples[: total * stage.batch]
    config = read_config(folder)
    limit = min(config.max_length_tokens, stage.max_length_tokens)
    mine = _share_of(samples, stage.batch, here.rank, here.world)
    # Before there are weights, a GPU, and threads of a process group: see Loader.
    feed = Feed(load_tokenizer(folder / "llm", folder), replace(config, max_length_tokens=limit))
    with Loader(feed, mine, stage.samples_at_once(here.world)) as loader:
        # As DeepSpeed would make it: it takes its fp32 copies from these, and fp32 weights of 15B fill most of a GPU.
        dtype = PRECISIONS[job.run.precision].weights
        model, tokenizer = load_native(folder, dtype=dtype, device=default_device(here.local_rank))
        config, model.config = model.config, replace(model.config, max_length_tokens=limit)
        set_trainable(model, stage.trainable)
        model.prepare_for_training()
        if stage.gradient_checkpointing:
            model.gradient_checkpointing_enable()
        engine = start(model, stage, job.run, total, here.world)
        use_flash_attention(model)  # now that the weights have the precision of the stage
        done = engine.resume(out / CHECKPOINTS, [out / LOSSES, out / SKIPPED])
        meter = Meter(job, model, engine, began)
        account = Account(engine, job, [sample.id for sample in samples], done, meter)
        _take_steps(job, engine, account, meter.fed(loader.batches(done * engine.micro_batches)), stop)
    account.check_weights()
    weights = engine.weights()
    if engine.rank == 0:
        model.config = config
        _save(model, tokenizer, weights, out)


def _take_steps(job: Job, engine: Engine, account: Account, batches: Iterator[Batch], stop: StopRequest) -> None:
    from nvila.components.train.account import Share

    saved = time.monotonic()
    share = Share()
    for index, batch in enumerate(batches, 1):
        share.add(batch, *engine.accumulate(**batch.to(engine.device).forward_arguments()))
        if index % engine.micro_batches:
            continue
        stopping, due = account.step(share, stop.asked, time.monotonic() - saved > job.run.checkpoint_seconds)
        share = Share()
        if account.done == account.total:
            break
        if stopping or due:
            account.save(Path(job.out, CHECKPOINTS))
            saved = time.monotonic()
        if stopping:
            raise Preempted(
                f"stage {job.stage.name} stopped after {account.done} of {account.total} steps; its checkpoint is kept"
            )


def _save(model: NVILA, tokenizer: Any, weights: dict[str, Any], out: Path) -> None:
    """Write `out/model`, and last the record without which the next attempt does not believe it."""
    from nvila.components.model.checkpoint.native import save_native

    partial = out / PARTIAL
    shutil.rmtree(partial, ignore_errors=True)
    save_native(model, tokenizer, partial, state_dict=weights)
    shutil.rmtree(out / "model", ignore_errors=True)
    partial.rename(out / "model")
    seal(out, out / RECORD, TRAINED)


def set_trainable(model: NVILA, parts: list[Any]) -> None:
    """Freeze everything but `parts` (names of the model's three parts)."""
    for name in ("vision_tower", "mm_projector", "llm"):
        getattr(model, name).requires_grad_(name in parts)


def _share_of(samples: list[Any], batch: int, rank: int, world: int) -> list[Any]:
    """This process's samples: of each global batch its contiguous slice, so the batch does not depend on `world`."""
    if world == 1:
        return samples
    per_rank = batch // world
    return [s for i in range(0, len(samples), batch) for s in samples[i + rank * per_rank : i + (rank + 1) * per_rank]]


class StopRequest:
    """Remembers SIGTERM or SIGINT until the step under way is over."""

    def __init__(self) -> None:
        self.asked = False
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._ask)

    def _ask(self, signum: int, frame: object) -> None:
        self.asked = True


if __name__ == "__main__":
    main(sys.argv[1])
    sys.exit(int(Exit.DONE))
