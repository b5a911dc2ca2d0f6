"""Stages that train adapters or layer norms by several processes, beside one; in processes of their own."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
from attempts import Attempt
from test_ranks import resumed
from test_tuning import row
from test_worker import losses, weights
from turns import some

from nvila.components.train.job import Job

pytestmark = pytest.mark.usefixtures("one_rank")
MakeJob = Callable[..., Job]
METHODS = [("lora", "lora"), ("layernorm", "qlora"), (None, "dora"), ("layernorm", None)]
RUNS = [(0, "none"), (1, "none"), (2, "none"), (2, "cpu"), (3, "none"), (3, "cpu")]
"""ZeRO stage and offload."""


def ended(make_job: MakeJob, name: str, stage: dict[str, Any], **run: Any) -> Job:
    """A stage that went to its end."""
    job = make_job(name, stage=stage, run=run)
    assert Attempt(job).wait() == [0] * job.run.gpus
    return job


@pytest.mark.parametrize(("methods", "run"), some(list(product(METHODS, RUNS)), 1), ids=str)
def test_two_processes_train_what_one_does(make_job: MakeJob, methods: Any, run: tuple[int, str]) -> None:
    """Adapters that begin otherwise in each process, of which each trains some: the mean of them is none."""
    zero, offload = run
    stage = row(*methods, micro_batch=4)
    if "lora" in stage:
        stage["lora"] |= {"dropout": 0.0}  # processes leave out each its own
    one = ended(make_job, "one", stage)
    two = ended(make_job, "two", stage, zero=zero, offload=offload, gpus=2)
    before, ours, theirs = (weights(job) for job in (one.model, one.out, two.out))
    moved = sum(float((ours[name] - before[name]).norm()) ** 2 for name in ours) ** 0.5
    apart = sum(float((ours[name] - theirs[name]).norm()) ** 2 for name in ours) ** 0.5
    assert apart < 1e-5 * moved
    assert [loss for _, loss in losses(two)] == pytest.approx([loss for _, loss in losses(one)], abs=1e-5)


@pytest.mark.parametrize(("zero", "first", "then"), some([(0, 2, 1), (1, 1, 2), (2, 2, 1), (3, 2, 1), (3, 1, 2)], 1))
def test_another_number_goes_on_with_adapters(make_job: MakeJob, zero: int, first: int, then: int) -> None:
    """A checkpoint without the frozen weights that nobody could make anew for other processes."""
    stage = row("layernorm", "lora", lora={"rank": 4, "dropout": 0.0})
    assert resumed(make_job, "fp32", zero, first, then, stage) < 1e-5
