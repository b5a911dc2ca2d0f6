"""A stage in plain PyTorch, as written down: no DeepSpeed, no micro batches, no ranks. Run by test_arithmetic.py."""

from __future__ import annotations

import faulthandler
import os
import signal
import sys
from pathlib import Path
from typing import Any

from nvila.components.train.job import Job


def plain(job: Job, device_batch: int | None = None) -> tuple[dict[str, Any], list[float], list[int]]:
    """Weights (fp32 masters), and loss and tokens of each step: AdamW on the mean over a batch's supervised tokens.

    With `device_batch`, on the mean of the means over the supervised tokens of so many rows each.
    """
    import torch

    from nvila.components.model.checkpoint.native import load_native
    from nvila.components.model.feed import Feed
    from nvila.components.train.data import stage_samples
    from nvila.components.train.schedule import warmup_cosine
    from nvila.components.train.tuning import tune

    torch.manual_seed(job.seed)
    stage, low = job.stage, job.run.precision == "bf16"
    model, tokenizer = load_native(Path(job.model), dtype="bfloat16" if low else "float32")
    tune(model, stage)
    model.prepare_for_training()
    samples = stage_samples(stage, Path(job.samples), [], job.seed, Path(job.out))
    total = len(samples) // stage.batch
    learning = {name: p for name, p in model.named_parameters() if p.requires_grad}
    masters = {name: p.detach().float().clone() for name, p in learning.items()}
    peaks = {name: stage.learning_rates.get(name.partition(".")[0], stage.learning_rate) for name in masters}  # type: ignore[call-overload]
    groups = [
        {"params": [master], "lr": peaks[name], "weight_decay": stage.weight_decay if master.ndim > 1 else 0.0}
        for name, master in masters.items()
    ]
    adam = torch.optim.AdamW(groups, betas=(0.9, 0.999), eps=1e-8)
    losses, lengths = [], []
    for step in range(total):
        for group, peak in zip(adam.param_groups, peaks.values(), strict=True):
            group["lr"] = peak * warmup_cosine(step, total, stage.warmup_ratio)
        rows = samples[step * stage.batch : (step + 1) * stage.batch]
        sums = {name: torch.zeros_like(m) for name, m in masters.items()}
        loss, length = 0.0, 0
        batches = [Feed(tokenizer, model.config).batch([sample]) for sample in rows]
        counts = [int((batch.labels[:, 1:] != -100).sum()) if batch.samples else 0 for batch in batches]
        size = device_batch or len(rows)
        for i, (batch, n) in enumerate(zip(batches, counts, strict=True)):
            # One by one, so that no padding and no order can matter.
            if not n:
                continue
            first = i - i % size
            share = n / sum(counts[first : first + size]) if device_batch else n
            out = model(**batch.forward_arguments()).loss * share
            out.backward()
            loss, length = loss + float(out.detach()), length + batch.input_ids.numel()
            for name, parameter in learning.items():
                if parameter.grad is not None:
                    sums[name] += parameter.grad.float()
                    parameter.grad = None
        divisor = sum(any(counts[i : i + size]) for i in range(0, len(rows), size)) if device_batch else sum(counts)
        for name, master in masters.items():
            master.grad = sums[name] / divisor
        if stage.clip_norm:
            torch.nn.utils.clip_grad_norm_(masters.values(), stage.clip_norm)
        adam.step()
        with torch.no_grad():
            for name, parameter in learning.items():
                parameter.copy_(masters[name])
        losses.append(loss / divisor)
        lengths.append(length)
    return masters, losses, lengths


def main() -> None:
    """Train each job of a file of JSON lines, under torchrun's variables as one of its ranks.

    An error of ours is written beside the job. In the stage `nan` the last rank's losses are not numbers.
    """
    from nvila.components.contracts.errors import NvilaError
    from nvila.components.train.engine import Engine, leave
    from nvila.components.train.loop import train

    class Never:
        asked = False

    faulthandler.register(signal.SIGUSR1)  # shows where it waits
    accumulate, rank = Engine.accumulate, int(os.environ["RANK"])

    def spoil(engine: Engine, **batch: Any) -> tuple[Any, int]:
        loss, supervised = accumulate(engine, **batch)
        return loss * float("nan"), supervised

    for line in Path(sys.argv[1]).read_text().splitlines():
        job = Job.model_validate_json(line)
        spoilt = job.stage.name == "nan" and rank == job.run.gpus - 1
        Engine.accumulate = spoil if spoilt else accumulate  # type: ignore[method-assign]
        try:
            train(job, Never())  # type: ignore[arg-type]
        except NvilaError as error:
            Path(job.out, f"error-{rank}").write_text(f"{type(error).__name__}: {error}")
    leave()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # as torchrun's forked ranks end: threads of torch have aborted an interpreter that went on to its end


if __name__ == "__main__":
    main()
