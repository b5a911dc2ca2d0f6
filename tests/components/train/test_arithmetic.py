"""Weights and losses of the real engine beside plain PyTorch, over answers of very different lengths."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matrix
import pytest
from matrix import Way
from turns import TODAY

from nvila.components.contracts.errors import TrainingError
from nvila.components.train.job import Job
from nvila.components.train.losses import read_losses

MakeJob = Callable[..., Job]
STAGE = {"data": {"s.sft": 4}, "learning_rate": 1e-3, "warmup_ratio": 0.0, "clip_norm": 0.5, "weight_decay": 0.1}
STAGE |= {"learning_rates": {"vision_tower": 2e-4}}
"""Four steps over the same eight questions. Two gradients in three are clipped."""


class Never:
    """Nobody asks to stop."""

    asked = False


@pytest.fixture(scope="module")
def samples(small: Any, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Seven answers of a word, and one of a hundred tokens and more."""
    return matrix.write_answers(small.root, tmp_path_factory.mktemp("lengths") / "samples.parquet")


@pytest.fixture(scope="module")
def known() -> matrix.Known:
    """What plain torch made."""
    return matrix.Known()


@pytest.fixture
def job_of(small: Any, tmp_path: Path, samples: str) -> Callable[[Way], Job]:
    """The job of a way, over four steps."""
    return lambda way: way.job(str(small.model.dir("model")), samples, tmp_path / str(way), data={"s.sft": 4})


def check(way: Way, job: Job, known: matrix.Known) -> None:
    masters, losses, tokens = known.of(job)
    assert matrix.apart(job, masters) < way.tolerance, way
    records = read_losses(Path(job.out, "loss.jsonl"))
    assert [r["tokens"] for r in records] == tokens
    assert [r["loss"] for r in records] == pytest.approx(losses, abs=1e-5 if way.precision == "fp32" else 1e-3)


def tried(world: int, always: list[Way], further: int) -> list[Way]:
    """Ways that are always tried, and a few of the others, which change from day to day; matrix.py tries all."""
    others = [way for way in matrix.ways([world]) if way not in always]
    return always + random.Random(TODAY).sample(others, further)


ALONE = [
    Way(1, 0, 1, "fp32"),
    Way(1, 3, 4, "fp32", checkpointing=True),
    Way(1, 0, 2, "bf16"),
    Way(1, 1, 4, "bf16", weighting="device_batch"),
    Way(1, 2, 4, "bf16", offload="cpu"),
    Way(1, 2, 1, "fp32", offload="cpu"),
]
TOGETHER = [Way(2, 0, 2, "fp32"), Way(2, 3, 1, "fp32"), Way(2, 2, 1, "bf16")]


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize("way", tried(1, ALONE, 2), ids=str)
def test_weights_are_those_of_plain_torch(job_of: Callable[[Way], Job], known: matrix.Known, way: Way) -> None:
    """A mean of micro batches' means gives the tokens of short answers many times the weight of those of long ones,
    where it is not asked for; and gradients of micro batches were counted twice."""
    from nvila.components.train.loop import train

    job = job_of(way)
    train(job, Never())  # type: ignore[arg-type]
    check(way, job, known)


@pytest.mark.slow
def test_two_processes_train_the_same_weights(
    job_of: Callable[[Way], Job], known: matrix.Known, small: Any, tmp_path: Path
) -> None:
    """Ranks whose answers differ in length would each weigh their own; and the log would hold the first one's alone.

    Where one has no picture and the other has, either would wait for the other in a collective of the tower.
    """
    jobs = {way: job_of(way) for way in tried(2, TOGETHER, 1)}
    blind = matrix.write_answers(small.root, tmp_path / "blind.parquet", blind=4)
    jobs = {way: job.model_copy(update={"samples": blind}) if way.zero >= 2 else job for way, job in jobs.items()}
    matrix.on_ranks(list(jobs.values()), 2)
    for way, job in jobs.items():
        check(way, job, known)


@pytest.mark.slow
def test_processes_end_together(make_job: MakeJob, samples: str) -> None:
    """What one process meets concerns all: another would wait for it in a collective until its time is up."""
    run = {"gpus": 2}
    first = make_job("skipped", stage=STAGE | {"max_length_tokens": 60}, samples=samples, run=run)
    second = make_job("nan", stage=STAGE | {"name": "nan", "micro_batch": 1}, samples=samples, run=run | {"zero": 3})
    none = make_job("none", stage=STAGE | {"max_length_tokens": 8}, samples=samples, run=run)
    matrix.on_ranks([none, second, first], 2)
    words = {job.out: [Path(job.out, f"error-{rank}") for rank in (0, 1)] for job in (none, second, first)}
    said = {out: [path.read_text() for path in paths if path.exists()] for out, paths in words.items()}
    assert said[first.out] == [] and len(read_losses(Path(first.out, "loss.jsonl"))) == 4
    assert said[none.out][0] == said[none.out][1] and "of 8 records cannot be used, 1 may" in said[none.out][0]
    assert said[second.out][0] == said[second.out][1] and said[second.out][0].count("s/sft/") == 4
    assert "optimizer step 0: the loss is not finite" in said[second.out][0]


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

    def too_far(engine: Engine, supervised: int, **how: Any) -> bool:
        finite = take(engine, supervised, **how)
        with torch.no_grad():
            next(engine.deepspeed.module.mm_projector.parameters()).view(-1)[0] = float("inf")
        return finite

    monkeypatch.setattr(Engine, "step", too_far)
    stage = STAGE | {"data": {"s.sft": steps}}
    job = make_job("a", stage=stage, samples=samples, run={"checkpoint_seconds": 0.0})
    with pytest.raises(TrainingError, match=r"optimizer step 1: weights are not finite .*mm_projector"):
        train(job, Never())  # type: ignore[arg-type]
    assert not Path(job.out, "model").exists() and not list(Path(job.out).glob("checkpoints/*"))
