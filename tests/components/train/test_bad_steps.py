"""Steps whose loss or gradient is not as it should be."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from test_worker import Stop, changed_parts, losses, weights

from nvila.components.contracts.errors import DataError, TrainingError
from nvila.components.train.engine import Engine
from nvila.components.train.job import Job
from nvila.components.train.loop import train
from nvila.components.train.losses import read_losses
from nvila.components.train.watch import Watch

pytestmark = pytest.mark.usefixtures("one_rank")
MakeJob = Callable[..., Job]
SKIP = {"bad_steps": "skip", "max_skipped_share": 1.0}
BAD = 3
"""The step that something is wrong with."""


@pytest.fixture
def poison(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """`poison("loss")`, `poison("gradient")`: not finite at step `BAD`; `poison("no")`: as good as at any other."""
    accumulate, fault = Engine.accumulate, Watch.fault

    def spoil(what: str) -> None:
        calls = iter(range(1, 1000))

        def spoilt(engine: Engine, **batch: Any) -> Any:
            if next(calls) != BAD or what == "no":
                return accumulate(engine, **batch)
            module = engine.deepspeed.module
            factor = math.nan if what == "loss" else 1.0
            handle = module.register_forward_hook(lambda _, __, out: replace(out, loss=out.loss * factor))
            if what == "gradient":
                hook = next(p for p in module.mm_projector.parameters()).register_hook(lambda g: g * math.inf)
            try:
                return accumulate(engine, **batch)
            finally:
                handle.remove()
                if what == "gradient":
                    hook.remove()

        looks = iter(range(1, 1000))
        unwanted = lambda watch, loss: "not wanted" if next(looks) == BAD else fault(watch, loss)  # noqa: E731
        monkeypatch.setattr(Engine, "accumulate", spoilt)
        monkeypatch.setattr(Watch, "fault", unwanted if what == "no" else fault)

    return spoil


@pytest.mark.parametrize(
    ("what", "precision", "zero"),
    [("loss", "fp32", 0), ("gradient", "fp32", 0), ("loss", "bf16", 0), ("loss", "bf16", 1), ("loss", "fp32", 3)],
)
def test_a_bad_step_is_as_if_it_had_not_been(
    make_job: MakeJob, poison: Callable[[str], None], what: str, precision: str, zero: int
) -> None:
    """One NaN in moments that live for a thousand steps; or a schedule that stands still where a step is left out."""
    jobs = {name: make_job(name, run=SKIP | {"precision": precision, "zero": zero}) for name in (what, "no")}
    for name, job in jobs.items():
        poison(name)
        train(job, Stop())
    bad, good = jobs[what], jobs["no"]
    assert [step for step, loss in losses(bad) if loss is None] == [BAD]
    assert read_losses(Path(bad.out, "loss.jsonl")) == read_losses(Path(good.out, "loss.jsonl"))
    assert not changed_parts(weights(good.out), weights(bad.out))
    rows = [json.loads(line) for line in Path(bad.out, "skipped.jsonl").read_text().splitlines()]
    assert len(rows) == 8 and {row["step"] for row in rows} == {BAD}
    assert all("not finite" in row["reason"] for row in rows)


def test_too_many_bad_steps_end_the_stage(make_job: MakeJob, poison: Callable[[str], None]) -> None:
    """A model that has diverged would be handed on as it was when it did."""
    poison("loss")
    with pytest.raises(DataError, match=r"6 of 24 records cannot be used, 3 may: the loss is not finite \(6: colours/"):
        train(make_job("a", run=SKIP | {"max_skipped_share": 0.1}), Stop())


def test_a_gradient_that_is_not_finite_names_its_samples(make_job: MakeJob, poison: Callable[[str], None]) -> None:
    """ "Something is NaN", after a week, of a million samples."""
    poison("gradient")
    with pytest.raises(TrainingError, match=r"step 2: the gradients are not finite.*bad_steps.*colours/sft/"):
        train(make_job("a"), Stop())


def test_a_spike_is_what_stands_out() -> None:
    """A stage that begins high, or falls fast, must not be taken for one that leaps."""
    usual = [9.0, 6.0, 4.0, 3.0, *[2.0] * 6]
    watch = Watch(3.0, usual[:-1])
    assert watch.fault(100.0) is None, "nine losses say little"
    watch = Watch(3.0, [*usual, None])
    assert watch.fault(None) is None and watch.fault(6.0) is None
    assert watch.fault(6.1) == "the loss is above 3.0 times its median"
    assert watch.fault(math.nan) == "the loss is not finite" == Watch(None, []).fault(math.inf)
    assert Watch(None, usual).fault(1e9) is None
