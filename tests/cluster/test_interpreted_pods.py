"""The compiled package of `micro` by an interpreter of its IR, every executor as a pod.

It takes minutes, so its turn comes on one day of seven; `tests/bench/run.py cluster` terminates runs at every step too.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from interpreted import PODS, Ground, Played, kill, prepared
from interpreter import SUCCEEDED

from nvila.components.contracts.steps import RESOLVE, ROWS

KILLED = "train-2"


@pytest.fixture(scope="module")
def ground(kubeconfig: Path, crds: Path) -> Iterator[Ground]:
    """A namespace for all runs, which share a store."""
    image = os.environ.get("NVILA_NODE_IMAGE") or pytest.skip("NVILA_NODE_IMAGE is not set")
    with prepared(kubeconfig, image) as made:
        yield made


@pytest.fixture(scope="module")
def whole(ground: Ground) -> Played:
    """A run of all steps, of which one is killed hard."""
    run = ground.play(PODS, {}, KILLED, kill)
    if run.ended[RESOLVE].state != SUCCEEDED and "other code" in run.log(ground.folder, RESOLVE):
        pytest.skip(f"{ground.image} is of another commit: make images")
    return run


@pytest.mark.turns(7, 3)
def test_every_executor_runs_as_a_pod_and_one_that_was_killed_again(ground: Ground, whole: Played) -> None:
    """A claim, a variable or an input under a wrong name is found by no check of the package, but by its pods."""
    assert whole.state == SUCCEEDED, {step: one.state for step, one in whole.ended.items()}
    starts = {step: whole.ended[step].attempts for step in ROWS}
    assert starts == dict.fromkeys(ROWS, 1) | {KILLED: 2}
    assert [one["type"] for one in ground.told if one["data"]["run"] == whole.name] == ["run.succeeded"]
    assert (ground.volume / "runs" / whole.name / "report.html").is_file()
