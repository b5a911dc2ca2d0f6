"""Six steps of the real engine on a GPU, beside plain PyTorch on the CPU; and a stage that is stopped and goes on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from matrix import Known, Way, apart, weights, write_answers

from nvila.components.contracts.errors import Preempted
from nvila.components.train.job import Job
from nvila.components.train.loop import train
from nvila.components.train.losses import read_losses

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU that torch can use"),
    pytest.mark.usefixtures("one_rank"),
]
TOLERANCE = {"fp32": 0.01, "bf16": 0.15}
"""Of the distance that the weights moved. AdamW's first steps make the rounding of small gradients large."""
WAYS = [
    Way(1, 0, 4, "fp32"),
    Way(1, 0, 4, "bf16"),
    Way(1, 1, 4, "bf16", packing="packed"),
    Way(1, 2, 8, "bf16", packing="grouped"),
    Way(1, 2, 4, "bf16", offload="cpu"),
    Way(1, 3, 4, "bf16", checkpointing=True),
    Way(1, 3, 4, "bf16", offload="cpu"),
]


class Stop:
    """Asks to stop, or does not."""

    def __init__(self, asked: bool = False) -> None:
        self.asked = asked


@pytest.fixture(scope="module")
def answers(small: Any, tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_answers(small.root, tmp_path_factory.mktemp("answers") / "samples.parquet")


@pytest.fixture(scope="module")
def known() -> Known:
    return Known()


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_weights_are_those_of_plain_torch(small: Any, answers: str, known: Known, tmp_path: Path, way: Way) -> None:
    """Kernels, streams and fused optimizers of a GPU are others than those that every other test has run."""
    job = way.job(str(small.model.dir("model")), answers, tmp_path / "out")
    train(job, Stop())  # type: ignore[arg-type]
    masters, losses, _ = known.of(job)
    assert apart(job, masters) < TOLERANCE[way.precision]
    told = [record["loss"] for record in read_losses(Path(job.out, "loss.jsonl"))]
    assert told == pytest.approx(losses, rel=2e-3 if way.precision == "fp32" else 0.03)


def test_a_stage_goes_on_where_it_was_stopped(make_job: Callable[..., Job]) -> None:
    """What a checkpoint holds of a GPU is copied beside its work: too early or too late it is of another step."""
    run = {"precision": "bf16", "checkpoint_seconds": 0.0}
    straight, stopped = make_job("straight", run=run), make_job("stopped", run=run)
    train(straight, Stop())  # type: ignore[arg-type]
    while True:
        try:
            train(stopped, Stop(asked=True))  # type: ignore[arg-type]
            break
        except Preempted:
            continue
    wanted, found = (weights(Path(job.out, "model")) for job in (straight, stopped))
    before = weights(straight.model)
    far = sum(float((found[name] - wanted[name]).norm()) for name in wanted)
    assert far < 0.02 * sum(float((before[name] - wanted[name]).norm()) for name in wanted)
