"""Samples a second of our trainer beside `transformers.Trainer` on batches padded to their longest. By hand:

    .venv/bin/python tests/bench/train_rows/trainer.py

Stages 4 and 5 of the recipe `tiny` on a share of its data, whole, and texts of 32 to 512 tokens: the same modules with
random weights, samples, order, batch (64), rates, clipping and AdamW over fp32 weights, in bf16. The Trainer is as a
user has it: `bf16=True`, no loader processes, and samples are decoded, tiled and tokenized when they are asked for.

`prepared` is the same Trainer with what our loop does to a model before the first step, to show what is the loop's and
what the kernels': bf16 weights (and no fp32 ones), their products in float32 where the CPU has none in bfloat16, and
attention without the fused kernel. `even` instead of log-uniform lengths is by hand too:

    .venv/bin/python tests/bench/train_rows/trainer.py even

Every way has a process of its own, in turns, with as many threads as the machine has CPUs, as steps of `nvila run`
have. The first steps are left out, and what our loader made ready meanwhile: here it may go no further ahead.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parents[1])]

SCALE = 0.05
TURNS = 2
WARM_UP = 2
"""Optimizer steps before the clock runs."""
WORKS = {
    "stage 4": "tiny's stage 4",
    "stage 5": "tiny's stage 5",
    "log": "texts of 32 to 512 tokens, lengths log-uniform",
    "even": "texts of 32 to 512 tokens, lengths uniform",
}
AT_LEAST = {"stage 4": 1.5, "stage 5": 2.0, "log": 2.5}
BASELINES = {"trainer": "transformers.Trainer, bf16=True", "prepared": "transformers.Trainer, model prepared by us"}
Row = tuple[str, str, float, float, str, float | None]


def rows(*works: str) -> Iterator[Row]:
    """Wall and CPU seconds of 1,000 samples, so that less is better; of each way its best turn (`prepared` has one)."""
    from train_rows.stages import made, mixture

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        jobs = made(folder, SCALE)
        for work in works or AT_LEAST:
            job = jobs.get(work) or mixture(folder, jobs["stage 4"], work)
            (folder / "job.json").write_text(job.model_dump_json())
            ways = ["trainer", *(["prepared"] if work in jobs else []), "ours"]
            found: dict[str, list[dict[str, float]]] = {way: [] for way in ways}
            for way in ways + ["trainer", "ours"] * (TURNS - 1):
                shutil.rmtree(job.out, ignore_errors=True)
                found[way].append(measured(Path(__file__), way, str(folder / "job.json")))
            wall, cpu = (
                {way: min(one[what] / one["samples"] * 1000 for one in turns) for way, turns in found.items()}
                for what in ("seconds", "cpu")
            )
            for way in ways[:-1]:
                at_least = AT_LEAST.get(work) if way == "trainer" else None
                yield WORKS[work], "s of 1,000 samples", wall[way], wall["ours"], BASELINES[way], at_least
                yield WORKS[work], "CPU s of 1,000 samples", cpu[way], cpu["ours"], BASELINES[way], None


def measured(script: Path, *arguments: str) -> Any:
    """What a process of this script tells of its steps."""
    threads = {"OMP_NUM_THREADS": str(len(os.sched_getaffinity(0))), "OMP_WAIT_POLICY": "PASSIVE"}
    meeting = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    environment = os.environ | threads | meeting | {"DS_LOG_LEVEL": "warning", "TRANSFORMERS_VERBOSITY": "error"}
    command = [sys.executable, str(script), *arguments]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


class Clock:
    """Wall time and CPU time of the steps after those of the warm-up, loader processes included."""

    def __init__(self) -> None:
        self._steps = 0
        self._began = self._now()
        self._ended = self._began

    def step(self) -> None:
        """A step is over."""
        self._steps += 1
        self._ended = self._now()
        if self._steps == WARM_UP:
            self._began = self._ended

    def told(self, batch: int) -> dict[str, float]:
        """Seconds, CPU seconds and samples."""
        seconds, cpu = (end - begin for begin, end in zip(self._began, self._ended, strict=True))
        return {"seconds": seconds, "cpu": cpu, "samples": (self._steps - WARM_UP) * batch}

    def _now(self) -> tuple[float, float]:
        import psutil

        cpu = time.process_time()
        for child in psutil.Process().children(recursive=True):
            with suppress(psutil.NoSuchProcess):
                times = child.cpu_times()
                cpu += times.user + times.system
        return time.monotonic(), cpu


def ours(job: Any) -> dict[str, float]:
    """The real loop of a stage."""
    from nvila.components.train import loader, loop
    from nvila.components.train.account import Account

    class Never:
        asked = False

    loader.AHEAD_CHUNKS = WARM_UP * -(-job.stage.batch // loader.CHUNK)
    clock, step = Clock(), Account.step

    def timed(account: Account, *arguments: Any) -> Any:
        found = step(account, *arguments)
        clock.step()
        return found

    Account.step = timed  # type: ignore[method-assign]
    loop.train(job, Never())  # type: ignore[arg-type]
    return clock.told(job.stage.batch)


def trainer(job: Any, *, prepared: bool = False) -> dict[str, float]:
    """What a user of transformers would write; or with a model that is prepared as ours are."""
    import torch
    from transformers import Trainer, TrainerCallback, TrainingArguments

    from nvila.components.model.batch import collate
    from nvila.components.model.checkpoint import native
    from nvila.components.model.feed import Feed, Item, _Kept
    from nvila.components.train.data import INDEX, stage_samples
    from nvila.components.train.tuning import tune

    if not prepared:
        native.use_float32_products = lambda _: None  # type: ignore[assignment]
    model, tokenizer = native.load_native(Path(job.model), dtype="bfloat16" if prepared else "float32")
    tune(model, job.stage)
    if prepared:
        model.prepare_for_training()
    stage, clock, out = job.stage, Clock(), Path(job.out)
    drawn = stage_samples(stage, Path(job.samples), [Path(k) for k in job.kept], job.seed, out / INDEX)
    samples = [replace(sample, media_sha256=()) for sample in drawn]  # no digest is taken again
    feed = Feed(tokenizer, model.config, _Kept(0))

    class Samples(torch.utils.data.Dataset[Item]):
        def __len__(self) -> int:
            return len(samples) // stage.batch * stage.batch

        def __getitem__(self, index: int) -> Item:
            return feed.item(samples[index])

    class Wrapped(torch.nn.Module):
        """Answers with the mapping that the Trainer wants."""

        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, num_items_in_batch: Any = None, **batch: Any) -> dict[str, torch.Tensor]:
            return {"loss": self.model(**batch).loss}

    class Told(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            clock.step()

    def padded(items: list[Item]) -> dict[str, Any]:
        return collate(items, tokenizer.pad_token_id).forward_arguments()

    arguments = TrainingArguments(
        output_dir=str(out),
        per_device_train_batch_size=stage.batch,
        num_train_epochs=1,
        learning_rate=stage.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=stage.warmup_ratio,
        max_grad_norm=stage.clip_norm or 0.0,
        bf16=not prepared,
        use_cpu=not torch.cuda.is_available(),
        train_sampling_strategy="sequential",
        remove_unused_columns=False,
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    Trainer(Wrapped(), arguments, padded, Samples(), callbacks=[Told()]).train()
    return clock.told(stage.batch)


def main(way: str, path: str) -> None:
    """Train the job of a file in one of the ways, and tell what it took."""
    from nvila.components.train.job import Job

    ways = {"ours": ours, "trainer": trainer, "prepared": lambda job: trainer(job, prepared=True)}
    print(json.dumps(ways[way](Job.model_validate_json(Path(path).read_bytes()))), flush=True)
    os._exit(0)


if __name__ == "__main__":
    if sys.argv[-1].endswith(".json"):
        main(*sys.argv[1:])
    for work, unit, baseline, found, what, wanted in rows(*sys.argv[1:]):
        aim = f", wanted {wanted:.3g}x" if wanted else ""
        print(f"{work}: {found:.2f} {unit}, {what} {baseline:.2f}: {baseline / found:.2f}x{aim}", flush=True)
