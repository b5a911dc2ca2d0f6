"""A stage in plain PyTorch, as written down: no DeepSpeed, no micro batches, no ranks. Run by test_arithmetic.py."""

from __future__ import annotations

import faulthandler
import os
import signal
import sys
from pathlib import Path
from typing import Any

from nvila.components.train.job import Job


def plain(job: Job) -> tuple[dict[str, Any], list[float], list[int]]:
    """Weights (fp32 masters), and loss and tokens of each step: AdamW on the mean over a batch's supervised tokens."""
    import torch

    from nvila.components.model.checkpoint.native import load_native
    from nvila.components.model.feed import Feed
    from nvila.components.train.data import stage_samples
    from nvila.components.train.loop import set_trainable
    from nvila.components.train.schedule import warmup_cosine

    torch.manual_seed(job.seed)
    stage, low = job.stage, job.run.precision == "bf16"
    model, tokenizer = load_native(Path(job.model), dtype="bfloat16" if low else "float32")
    set_trainable(model, stage.trainable)
    model.prepare_for_training()
    samples = stage_samples(stage, Path(job.samples), [], job.seed)
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
        loss, tokens, length = 0.0, 0, 0
        for sample in rows:  # one by one, so that no padding and no order can matter
            batch = Feed(tokenizer, model.config).batch([sample])
            if not batch.samples:
                continue
            n = int((batch.labels[:, 1:] != -100).sum())
            out = model(**batch.forward_arguments()).loss * n
            out.backward()
            loss, tokens, length = loss + float(out.detach()), tokens + n, length + batch.input_ids.numel()
            for name, parameter in learning.items():
                if parameter.grad is not None:
                    sums[name] += parameter.grad.float()
                    parameter.grad = None
        for name, master in masters.items():
            master.grad = sums[name] / tokens
        if stage.clip_norm:
            torch.nn.utils.clip_grad_norm_(masters.values(), stage.clip_norm)
        adam.step()
        with torch.no_grad():
            for name, parameter in learning.items():
                parameter.copy_(masters[name])
        losses.append(loss / tokens)
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
