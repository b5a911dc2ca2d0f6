"""Weights and losses of the real engine beside plain PyTorch, over answers of very different lengths."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import plain_torch
import psutil
import pytest

from nvila.components.contracts.errors import TrainingError
from nvila.components.train.job import Job
from nvila.components.train.losses import read_losses

MakeJob = Callable[..., Job]
STAGE = {"data": {"s.sft": 4}, "learning_rate": 1e-3, "warmup_ratio": 0.0, "clip_norm": 0.5, "weight_decay": 0.1}
STAGE |= {"learning_rates": {"vision_tower": 2e-4}}
"""Four steps over the same eight questions. Two gradients in three are clipped."""
TOLERANCE = {"fp32": 1e-4, "bf16": 0.04}
"""Of the distance that the weights moved. In bf16 the rounding of activations and of single gradients leaves 0.026; one
step of AdamW on nothing before the first leaves 0.3."""

PATIENCE_SECONDS = 900
"""For what takes half a minute on two idle cores; a rank that is still there by then shows where it waits."""


class Never:
    """Nobody asks to stop."""

    asked = False


@pytest.fixture(scope="module")
def samples(small: Any, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Seven answers of a word, and one of a hundred tokens and more."""
    from nvila.components.data.samples import write_samples

    answers = ["red", "no", "yes", "blue", "green", "no", "yes", "red green blue " * 12]
    rows = []
    for i, answer in enumerate(answers):
        turns = [{"from": "human", "value": "<image>\nWhich colour is it?"}, {"from": "gpt", "value": answer}]
        row = {"id": f"s/sft/{i}", "source": "s", "kind": "image", "split": "sft", "root": str(small.root), "line": i}
        row |= {"media": [f"sft-{i}.png"], "media_sha256": [""], "conversations": json.dumps(turns)}
        rows.append(row | {"question": "Which colour is it?", "answer": answer})
    path = tmp_path_factory.mktemp("lengths") / "samples.parquet"
    write_samples(path, rows)
    return str(path)


@pytest.fixture(scope="module")
def wanted() -> dict[str, Any]:
    """What plain torch made, by precision."""
    return {}


def check(job: Job, wanted: dict[str, Any]) -> None:
    import torch
    from safetensors.torch import load_file

    precision = job.run.precision
    if precision not in wanted:
        wanted[precision] = plain_torch.plain(job)
    masters, losses, tokens = wanted[precision]

    def weights(folder: str | Path) -> dict[str, Any]:
        named = {}
        for part in ("vision_tower", "mm_projector", "llm"):
            for name, tensor in load_file(Path(folder, part, "model.safetensors")).items():
                named[f"{part}.{name.removeprefix('vision_model.')}"] = tensor.float()
        return named

    def low(tensor: Any) -> Any:
        return tensor.bfloat16().float() if precision == "bf16" else tensor

    before, after = weights(job.model), weights(Path(job.out, "model"))
    assert after.keys() == masters.keys()
    moved = torch.cat([(low(master) - low(before[name])).flatten() for name, master in masters.items()])
    apart = torch.cat([(low(master) - after[name]).flatten() for name, master in masters.items()])
    assert float(apart.norm() / moved.norm()) < TOLERANCE[precision]
    records = read_losses(Path(job.out, "loss.jsonl"))
    assert [r["tokens"] for r in records] == tokens
    assert [r["loss"] for r in records] == pytest.approx(losses, abs=1e-5 if precision == "fp32" else 1e-3)


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize(
    ("precision", "zero", "micro"),
    [("fp32", 0, 8), ("fp32", 0, 1), ("fp32", 1, 2), ("fp32", 3, 4), ("bf16", 0, 8), ("bf16", 0, 2), ("bf16", 2, 4)],
)
def test_weights_are_those_of_plain_torch(
    make_job: MakeJob, samples: str, wanted: dict[str, Any], precision: str, zero: int, micro: int
) -> None:
    """A mean of micro batches' means gives the tokens of short answers many times the weight of those of long ones."""
    from nvila.components.train.loop import train

    job = make_job(
        "a", stage=STAGE | {"micro_batch": micro}, run={"precision": precision, "zero": zero}, samples=samples
    )
    train(job, Never())  # type: ignore[arg-type]
    check(job, wanted)


@pytest.mark.slow
def test_two_processes_train_the_same_weights(make_job: MakeJob, samples: str, wanted: dict[str, Any]) -> None:
    """Ranks whose answers differ in length would each weigh their own; and the log would hold the first one's alone."""
    jobs = [
        make_job(f"{precision}-{zero}", stage=STAGE | {"micro_batch": micro}, samples=samples, run=run)
        for precision, zero, micro in (("fp32", 0, 2), ("fp32", 3, 4), ("bf16", 0, 4), ("bf16", 2, 1))
        for run in [{"precision": precision, "zero": zero, "gpus": 2}]
    ]
    two_ranks(jobs)
    for job in jobs:
        check(job, wanted)


@pytest.mark.slow
def test_processes_end_together(make_job: MakeJob, samples: str) -> None:
    """What one process meets concerns all: another would wait for it in a collective until its time is up."""
    run = {"gpus": 2}
    first = make_job("skipped", stage=STAGE | {"max_length_tokens": 60}, samples=samples, run=run)
    second = make_job("nan", stage=STAGE | {"name": "nan", "micro_batch": 1}, samples=samples, run=run | {"zero": 3})
    none = make_job("none", stage=STAGE | {"max_length_tokens": 8}, samples=samples, run=run)
    two_ranks([none, second, first])
    words = {job.out: [Path(job.out, f"error-{rank}") for rank in (0, 1)] for job in (none, second, first)}
    said = {out: [path.read_text() for path in paths if path.exists()] for out, paths in words.items()}
    assert said[first.out] == [] and len(read_losses(Path(first.out, "loss.jsonl"))) == 4
    assert said[none.out][0] == said[none.out][1] and "of 8 records cannot be used, 1 may" in said[none.out][0]
    assert said[second.out][0] == said[second.out][1] and said[second.out][0].count("s/sft/") == 4
    assert "optimizer step 0: the loss is not finite" in said[second.out][0]


def two_ranks(jobs: list[Job]) -> None:
    """Train jobs one after the other by two processes, which meet as under torchrun: at a store that is kept here."""
    from torch.distributed import TCPStore

    listing = Path(jobs[0].out).parent / "jobs.jsonl"
    listing.write_text("\n".join(job.model_dump_json() for job in jobs))
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    variables = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port)}
    variables |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "DS_LOG_LEVEL": "warning"}
    command = [sys.executable, plain_torch.__file__, str(listing)]
    ranks = [
        psutil.Popen(command, env=os.environ | variables | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(2)
    ]
    _, alive = psutil.wait_procs(ranks, timeout=PATIENCE_SECONDS)
    for process in [one for rank in alive for one in (rank, *rank.children())]:
        process.send_signal(signal.SIGUSR1)  # the stacks of all its threads on stderr
        time.sleep(1)
        process.kill()
    assert not alive, "a rank did not end: the stacks of the ranks, each with its loader, are on stderr"
    assert [rank.wait() for rank in ranks] == [0, 0]


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize(("precision", "zero"), [("fp32", 0), ("fp32", 2), ("bf16", 0), ("bf16", 3)])
def test_a_gradient_that_is_not_finite_ends_the_stage(
    make_job: MakeJob, samples: str, monkeypatch: pytest.MonkeyPatch, precision: str, zero: int
) -> None:
    """One engine wrote NaN into every weight, the others left the step out and said nothing."""
    import torch

    from nvila.components.model.nvila import NVILA
    from nvila.components.train.loop import train

    calls = []

    class Overflow(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, features: Any) -> Any:
            return features.clone()

        @staticmethod
        def backward(ctx: Any, gradient: Any) -> Any:
            calls.append(1)
            return gradient * (float("inf") if len(calls) == 3 else 1.0)

    features = NVILA.features
    monkeypatch.setattr(NVILA, "features", lambda self, tiles: Overflow.apply(features(self, tiles)))
    run = {"precision": precision, "zero": zero, "checkpoint_seconds": 0.0}
    job = make_job("a", stage=STAGE, run=run, samples=samples)
    with pytest.raises(TrainingError, match=r"optimizer step 2: the gradients are not finite.*s/sft/\d") as caught:
        train(job, Never())  # type: ignore[arg-type]
    assert "learning_rate" in str(caught.value)
    assert not Path(job.out, "model").exists()
    assert sorted(path.name for path in Path(job.out, "checkpoints").glob("step-*")) == ["step-1", "step-2"]
    assert len(read_losses(Path(job.out, "loss.jsonl"))) == 2


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize("steps", [1, 2])
def test_weights_that_are_not_finite_are_not_written(
    make_job: MakeJob, samples: str, monkeypatch: pytest.MonkeyPatch, steps: int
) -> None:
    """A step may lead there from a finite loss and finite gradients; the next stage, or a resume, begins there."""
    import torch

    from nvila.components.train.engine import Engine
    from nvila.components.train.loop import train

    take = Engine.step

    def too_far(engine: Engine, supervised: int) -> bool:
        finite = take(engine, supervised)
        with torch.no_grad():
            next(engine.deepspeed.module.mm_projector.parameters()).view(-1)[0] = float("inf")
        return finite

    monkeypatch.setattr(Engine, "step", too_far)
    stage = STAGE | {"data": {"s.sft": steps}}
    job = make_job("a", stage=stage, samples=samples, run={"checkpoint_seconds": 0.0})
    with pytest.raises(TrainingError, match=r"optimizer step 1: weights are not finite .*mm_projector"):
        train(job, Never())  # type: ignore[arg-type]
    assert not Path(job.out, "model").exists() and not list(Path(job.out).glob("checkpoints/*"))
