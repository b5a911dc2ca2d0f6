"""The compiled package of `micro` by an interpreter of its IR, every executor as a pod: a whole run, a verdict, ends.

Each day other steps are terminated; `tests/bench/run.py cluster` has all of them.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from interpreted import JOBS, PODS, STEPS, Ground, Played, kill, prepared, terminate
from interpreter import FAILED, SKIPPED, SUCCEEDED
from turns import some

from nvila.components.contracts.steps import GATE, PREFLIGHT, QUANTIZE, REPORT, RESOLVE, ROWS
from nvila.pipelines.compile.package import RETRIES

KILLED = "train-2"
REJECTING = '{"evaluate": {"gate": {"min_accuracy": {"digits": 1.0}}}}'


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


def test_every_executor_runs_as_a_pod_and_one_that_was_killed_again(ground: Ground, whole: Played) -> None:
    """A claim, a variable or an input under a wrong name is found by no check of the package, but by its pods."""
    assert whole.state == SUCCEEDED, {step: one.state for step, one in whole.ended.items()}
    starts = {step: whole.ended[step].attempts for step in ROWS}
    assert starts == dict.fromkeys(ROWS, 1) | {KILLED: 2}
    assert [one["type"] for one in ground.told if one["data"]["run"] == whole.name] == ["run.succeeded"]
    assert (ground.volume / "runs" / whole.name / "report.html").is_file()


def test_a_verdict_stays_and_ends_the_run(ground: Ground, whole: Played) -> None:
    """KFP cannot tell a refusal from a fault, so it starts the step again: none of its pods may come to another end."""
    known = {step: one for step, one in whole.ended.items() if step in ROWS and step not in (RESOLVE, GATE, REPORT)}
    run = ground.play(PODS, known, overrides=REJECTING)
    assert run.state == FAILED
    assert (run.ended[GATE].attempts, run.ended[QUANTIZE].state) == (RETRIES + 1, SKIPPED)
    logs = [run.log(ground.folder, GATE, attempt).splitlines()[-1] for attempt in range(RETRIES + 1)]
    assert "digits" in logs[0] and len(set(logs)) == 1
    assert [one["type"] for one in ground.told if one["data"]["run"] == run.name] == ["run.rejected"]


@pytest.fixture(scope="module")
def placed(ground: Ground, whole: Played) -> Played:
    """What `resolve` says where heavy steps become jobs."""
    return ground.play(JOBS, {}, PREFLIGHT, terminate)


@pytest.mark.parametrize("step", some(STEPS, 3))
def test_a_terminated_run_is_closed_and_its_jobs_are_gone(
    ground: Ground, whole: Played, placed: Played, step: str
) -> None:
    """A job that goes on after its run holds GPUs for days, and nobody looks for it."""
    known = {**whole.ended, RESOLVE: placed.ended[RESOLVE]}
    assert ground.faults(ground.play(JOBS, known, step, terminate), step) == []
