"""One training process, started by torchrun (here or on a cluster): load, resume, loop, save."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nvila.components.contracts.errors import NvilaError, Preempted
from nvila.components.contracts.exits import Exit
from nvila.components.contracts.manifest import write_atomic
from nvila.components.contracts.progress import Progress
from nvila.components.train.job import VERDICT, Job

if TYPE_CHECKING:
    from nvila.components.model.nvila import NVILA


def main(job_path: str) -> None:
    """Train the stage that the job file describes, from its last checkpoint if there is one."""
    job = Job.model_validate_json(Path(job_path).read_bytes())
    stop = _StopRequest()
    try:
        train(job, stop)
    except NvilaError as error:
        if int(os.environ.get("RANK", "0")) == 0:
            record = {"error": type(error).__name__, "message": str(error), "exit_code": int(error.exit_code)}
            write_atomic(Path(job.out, VERDICT), json.dumps(record))
        print(error, file=sys.stderr, flush=True)
        sys.stdout.flush()
        os._exit(int(error.exit_code))  # other ranks may wait in a collective: do not join them


def train(job: Job, stop: _StopRequest) -> None:
    """The training loop."""
    import torch

    from nvila.components.model.checkpoint import load_native, save_native
    from nvila.components.model.feed import Feed
    from nvila.components.train.data import stage_samples
    from nvila.components.train.engine import start

    torch.manual_seed(job.seed)
    out, stage = Path(job.out), job.stage
    samples = stage_samples(stage, Path(job.samples), [Path(k) for k in job.kept], job.seed)
    total = len(samples) // stage.batch
    device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if torch.cuda.is_available() else "cpu"
    model, tokenizer = load_native(Path(job.model), dtype="float32", device=device)
    set_trainable(model, stage.trainable)
    model.prepare_for_training()
    if stage.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    engine = start(model, stage, job.run, total)
    done = engine.resume(out / "checkpoints")
    log = _LossLog(out / "loss.jsonl", done) if engine.rank == 0 else None
    micro = stage.batch // (engine.micro_batches * engine.world)
    mine = _share_of(samples[: total * stage.batch], stage.batch, micro, engine.rank, engine.world)
    feed = Feed(tokenizer, model.config)
    progress = Progress(f"stage {stage.name}", total)
    progress.update(done)
    saved = time.monotonic()
    losses: list[float] = []
    for index, batch in enumerate(feed.batches(mine, micro, start=done * engine.micro_batches), 1):
        learning_rate = engine.learning_rate
        loss = engine.forward(**vars(batch.to(device)))
        engine.backward(loss)
        losses.append(float(loss.detach()))
        if index % engine.micro_batches:
            continue
        done += 1
        mean = sum(losses) / len(losses)
        losses.clear()
        if log:
            log.write(step=done, loss=round(mean, 6), lr=learning_rate, tokens=int(batch.attention_mask.sum()))
            progress.update(1, f"loss {mean:.3f}")
        asked = stop.agreed(engine.world)
        if asked or time.monotonic() - saved > job.run.checkpoint_seconds:
            engine.save(out / "checkpoints", done)
            saved = time.monotonic()
        if asked and done < total:
            raise Preempted(f"stage {stage.name} stopped after {done} of {total} steps; its checkpoint is kept")
    if engine.rank == 0:
        partial = out / "model.partial"
        shutil.rmtree(partial, ignore_errors=True)
        save_native(model, tokenizer, partial)
        shutil.rmtree(out / "model", ignore_errors=True)
        partial.rename(out / "model")


def set_trainable(model: NVILA, parts: list[Any]) -> None:
    """Freeze everything but `parts` (names of the model's three parts)."""
    for name in ("vision_tower", "mm_projector", "llm"):
        getattr(model, name).requires_grad_(name in parts)


def _share_of(samples: list[Any], batch: int, micro: int, rank: int, world: int) -> list[Any]:
    """This process's samples: of each global batch its contiguous slice, so the batch does not depend on `world`."""
    if world == 1:
        return samples
    per_rank = batch // world
    return [s for i in range(0, len(samples), batch) for s in samples[i + rank * per_rank : i + (rank + 1) * per_rank]]


class _StopRequest:
    """Remembers SIGTERM or SIGINT until the step under way is over."""

    def __init__(self) -> None:
        self._asked = False
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._ask)

    def _ask(self, signum: int, frame: object) -> None:
        self._asked = True

    def agreed(self, world: int) -> bool:
        """Whether any process was asked to stop: all must stop at the same step."""
        if world == 1:
            return self._asked
        import torch

        flag = torch.tensor([int(self._asked)])
        if torch.cuda.is_available():
            flag = flag.cuda()
        torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MAX)
        return bool(flag.item())


class _LossLog:
    """`loss.jsonl`: one line per optimizer step; lines after the checkpoint that is resumed are dropped."""

    def __init__(self, path: Path, done: int) -> None:
        lines = path.read_text().splitlines()[:done] if path.exists() else []
        self._stream = path.open("w")
        self._stream.writelines(line + "\n" for line in lines)

    def write(self, **record: float) -> None:
        self._stream.write(json.dumps(record) + "\n")
        self._stream.flush()


if __name__ == "__main__":
    main(sys.argv[1])
    sys.exit(int(Exit.DONE))
