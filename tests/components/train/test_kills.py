"""Kills while a stage is trained; the campaign of many at random instants is `kills.py`."""

from __future__ import annotations

import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from attempts import Attempt
from kills import EVERY_STEP, STAGES, WAYS, same
from turns import some

from nvila.components.train.job import Job

MakeJob = Callable[..., Job]
PHASES = {"step": 3, "copy": 2, "write": 2, "rename": 2, "model": 1}
"""Where a stage is killed, and how often it comes by there first."""


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize("way", some([1, 0], 1))
def test_a_stage_that_is_killed_in_every_phase_makes_the_same_model(make_job: MakeJob, way: int) -> None:
    """Weights that are resumed beside another step's moments, a checkpoint that is half written, or a model of which a
    part was on the disk: each trains another model than the one that was asked for, and nobody sees it."""
    straight, killed = (make_job(name, stage=WAYS[way], run=EVERY_STEP) for name in ("straight", "killed"))
    assert Attempt(straight).wait() == [0]
    at = Path(killed.out, "checkpoints")
    reached = []
    for stage, count in PHASES.items():
        assert Attempt(killed, partial(STAGES[stage], count)).wait() == [-signal.SIGKILL], stage
        reached.append(max((int(path.name.removeprefix("step-")) for path in at.glob("step-*")), default=0))
    assert reached == sorted(reached) and reached[0] > 0 and reached[-1] > 3, "work was lost"
    assert Attempt(killed).wait() == [0]
    same(killed, straight)
    assert not list(at.glob("partial-*"))
