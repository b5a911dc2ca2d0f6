"""One training process, started by torchrun (here or on a cluster): load, resume, loop, save."""

from __future__ import annotations

import os
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nvila.components.contracts.environment import Environment, current, entered
from nvila.components.contracts.errors import Preempted
from nvila.components.contracts.exits import Exit
from nvila.components.contracts.files import write_atomic
from nvila.components.contracts.precisions import PRECISIONS
from nvila.components.contracts.sealed import seal
from nvila.components.contracts.text import say
from nvila.components.tracking.redact import tell
from nvila.components.train import adapters, verdict
from nvila.components.train.adapters import ADAPTER
from nvila.components.train.checkpoints import clear, probably_at
from nvila.components.train.engine import Engine, leave, receive, start
from nvila.components.train.job import FP8, RECORD, TRAINED, Job
from nvila.components.train.tuning import loaded, unquantized

if TYPE_CHECKING:
    import torch

    from nvila.components.model.batch import Batch
    from nvila.components.model.checkpoint.layouts import Checkpoint
    from nvila.components.model.checkpoint.tensorfile import Later
    from nvila.components.model.nvila import NVILA
    from nvila.components.train.account import Account
    from nvila.components.train.windows import Windows

CHECKPOINTS, PARTIAL = "checkpoints", "model.partial"
"""Folders of an unfinished stage."""
LOST_SECONDS = 1.0
"""Longer than torchrun's agent takes from one look at its processes to the next."""


def main(job_path: str) -> None:
    """Train the stage that the job file describes, from its last checkpoint if there is one."""
    out = Path(job_path).parent
    try:
        stop = StopRequest()
        with entered(Environment.read()):
            train(Job.model_validate_json(Path(job_path).read_bytes()), stop)
            leave()
    except BaseException as caught:
        error = verdict.named(caught, out)
        if error is not caught:
            _make_room(caught, out)
        print(tell(str(error)), file=sys.stderr, flush=True)
        sys.stdout.flush()
        verdict.give(out, error)
        # Perhaps another was killed: the agent, which names the first, is to see that one first.
        if error is not caught:
            time.sleep(LOST_SECONDS)
        os._exit(int(error.exit_code))  # other ranks may wait in a collective: do not join them


def _make_room(error: BaseException, out: Path) -> None:
    """Remove what was half written: where the disk is full, the verdict needs room."""
    caused: BaseException | None = error
    while caused:
        traceback.clear_frames(caused.__traceback__)  # a file that is still open keeps its room
        caused = caused.__context__
    with suppress(OSError):
        clear(out / CHECKPOINTS)
    for name in (PARTIAL, ADAPTER):
        shutil.rmtree(out / name, ignore_errors=True)


def train(job: Job, stop: StopRequest) -> None:
    """The training loop.

    Raises:
        TrainingError: a loss, a gradient or a weight is not finite.
        DataError: more samples cannot be used than `max_skipped_share` allows.
        Preempted: asked to stop.
    """
    from nvila.components.model.checkpoint.changes import changed
    from nvila.components.model.checkpoint.native import open_native
    from nvila.components.model.device import default_device, use_flash_attention
    from nvila.components.model.feed import Feed
    from nvila.components.precision.backends import backend
    from nvila.components.precision.products import require
    from nvila.components.train.account import Account
    from nvila.components.train.data import INDEX, stage_samples
    from nvila.components.train.keeper import Keeper
    from nvila.components.train.loader import Loader
    from nvila.components.train.losses import LOSSES, SKIPPED
    from nvila.components.train.meter import Meter

    began = time.monotonic()
    out, stage, folder, here = Path(job.out), job.stage, Path(job.model), current()
    samples = stage_samples(stage, Path(job.samples), [Path(k) for k in job.kept], job.seed, out / INDEX)
    total = len(samples) // stage.batch
    samples = samples[: total * stage.batch]
    given = changed(open_native(folder), stage.model)
    config = given.config
    if PRECISIONS[job.run.precision].fp8:
        require(config.llm, job.run)
        backend(job.run)
    limit = min(config.max_length_tokens, stage.max_length_tokens)
    mine = samples.share(stage.batch, here.rank, here.world)
    # Before there are weights, a GPU, and threads of a process group: see Loader.
    feed = Feed(given.load_tokenizer(), replace(config, max_length_tokens=limit))
    per_step = stage.batch // here.world
    with Loader(feed, mine, per_step, job.run.loader_processes, job.run.loader_seconds) as loader:
        loader.begin(probably_at(out / CHECKPOINTS))
        verdict.obey(out)
        taken = receive(stage, job.run, here.world)
        model, tokenizer = loaded(given, job, default_device(here.local_rank), taken)
        config, model.config = model.config, replace(model.config, max_length_tokens=limit)
        model.prepare_for_training()
        if stage.gradient_checkpointing:
            model.gradient_checkpointing_enable()
        engine = start(model, stage, job.run, total, here.world)
        if engine.products and engine.rank == 0:
            write_atomic(out / FP8, engine.products.told.model_dump_json() + "\n")
        use_flash_attention(model)  # now that the weights have the precision of the stage
        windows = _windows(job, model, tokenizer.pad_token_id, limit)
        keeper = Keeper(engine, out / CHECKPOINTS, [out / LOSSES, out / SKIPPED], job.run, job.base)
        done = keeper.resume()
        meter = Meter(job, model, engine, began, total - done, here)
        account = Account(engine, keeper, job, samples, done, meter)
        _take_steps(job, engine, account, meter.fed(map(windows.passes, loader.steps(done))), stop, windows)
    account.finish()
    with engine.weights() as weights:
        if engine.rank == 0:
            model.config = config
            _save(model, tokenizer, weights, given, job)


def _windows(job: Job, model: NVILA, pad_id: int, limit: int) -> Windows:
    """How global batches become passes of this model, where it is."""
    from nvila.components.model.device import use_packed_attention
    from nvila.components.train.packing import Cost, arrange
    from nvila.components.train.windows import Windows

    packing, most = job.run.arranged, job.stage.samples_at_once(current().world)
    flat = job.run.kernel and use_packed_attention(model)
    cost = Cost.of(model.config.llm, gpu=model.device.type == "cuda", kernel=flat)
    multiple = PRECISIONS[job.run.precision].multiple
    return Windows(lambda lengths: arrange(lengths, most, limit, cost, packing), pad_id, flat=flat, multiple=multiple)


def _take_steps(
    job: Job, engine: Engine, account: Account, steps: Iterator[Iterator[Batch]], stop: StopRequest, windows: Windows
) -> None:
    from nvila.components.train.account import Share

    saved, first = time.monotonic(), account.done
    for passes in steps:
        share = Share()
        _reseed(job.seed, account.done, engine.rank)
        for batch in engine.together(passes, windows.nothing()):
            share.add(batch, *engine.accumulate(**batch.to(engine.device).forward_arguments()))
        if account.done == first and engine.rank == 0 and windows.last:
            say(f"stage {job.stage.name} goes through the model {windows.last.words}")
        stopping, due = account.step(share, stop.asked, time.monotonic() - saved > job.run.checkpoint_seconds)
        if account.done == account.total:
            break
        if stopping or due:
            account.save()
            saved = time.monotonic()
        if stopping:
            account.finish()
            raise Preempted(
                f"stage {job.stage.name} stopped after {account.done} of {account.total} steps; its checkpoint is kept"
            )


def _reseed(seed: int, step: int, rank: int) -> None:
    """What is random in a step follows from these, on every device: a resume then repeats what an adapter's dropout
    leaves out, whatever went before, and by whatever number of processes."""
    import torch

    torch.manual_seed(int.from_bytes(sha256(f"{seed} {step} {rank}".encode()).digest()[:8], "big"))


def _save(
    model: NVILA, tokenizer: Any, weights: Mapping[str, torch.Tensor | Later], given: Checkpoint, job: Job
) -> None:
    """Write `model/` and the adapters that are merged into it, and last the record without which the next attempt does
    not believe them."""
    from nvila.components.model.checkpoint.native import save_native

    out = Path(job.out)
    partial = out / PARTIAL
    shutil.rmtree(partial, ignore_errors=True)
    shutil.rmtree(out / ADAPTER, ignore_errors=True)
    if job.stage.adapted:
        adapters.write(model, weights, job.stage, out / ADAPTER)
        weights = adapters.merged(model, weights, unquantized(given, job.run))
    save_native(model, tokenizer, partial, state_dict=weights)
    shutil.rmtree(out / "model", ignore_errors=True)
    partial.rename(out / "model")
    seal(out, out / RECORD, TRAINED)


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
