"""A stage resumed by another number of processes: one case each day, all of them with
`EVERY_TEST=1 .venv/bin/python -m pytest -s tests/components/train/test_ranks.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from attempts import Attempt
from test_worker import Stop, losses, weights
from turns import some

from nvila.components.train.job import Job

MakeJob = Callable[..., Job]
CASES = [
    ("fp32", 0, 2, 1),
    ("fp32", 1, 2, 1),
    ("fp32", 2, 2, 1),
    ("fp32", 3, 2, 1),
    ("fp32", 0, 1, 2),
    ("fp32", 1, 1, 2),
    ("fp32", 3, 1, 2),
    ("bf16", 0, 2, 1),
    ("bf16", 1, 2, 1),
    ("bf16", 2, 2, 1),
    ("bf16", 3, 2, 1),
]
"""Precision, ZeRO stage, and how many processes begin and end it."""


def resumed(
    make_job: MakeJob, precision: str, zero: int, first: int, then: int, stage: dict[str, Any] | None = None
) -> float:
    """How far the losses of a stage that other processes end are from those of one that they do not: the most."""
    run = {"precision": precision, "zero": zero}
    straight = make_job("straight", stage=stage, run=run | {"gpus": then})
    begun = make_job("moved", stage=stage, run=run | {"gpus": first})
    ended = make_job("moved", stage=stage, run=run | {"gpus": then})
    assert Attempt(begun, stop=Stop(after=3)).wait() == [75] * first
    assert Attempt(ended).wait() == [0] * then
    assert Attempt(straight).wait() == [0] * then
    assert [step for step, _ in losses(ended)] == [1, 2, 3, 4, 5, 6]
    ours, wanted = weights(ended.out), weights(straight.out)
    moved = max(float((ours[name].float() - wanted[name].float()).abs().max()) for name in wanted)
    apart = max(abs(a - b) for (_, a), (_, b) in zip(losses(ended), losses(straight), strict=True))
    print(f"{precision}, ZeRO {zero}, {first} to {then} processes: losses {apart:.1e} apart, weights {moved:.1e}")
    return apart


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize(("precision", "zero", "first", "then"), some(CASES, 1))
def test_another_number_goes_on(make_job: MakeJob, precision: str, zero: int, first: int, then: int) -> None:
    """A stage that lost a GPU begins anew, or goes on with the moments of other weights."""
    assert resumed(make_job, precision, zero, first, then) < (1e-6 if precision == "fp32" else 2e-2)
