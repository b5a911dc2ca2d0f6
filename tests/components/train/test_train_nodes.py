"""Two nodes of one training job, as Kubeflow Trainer starts them, on this machine."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from nvila.components.contracts.environment import Environment
from nvila.components.contracts.exits import Exit
from nvila.components.contracts.manifest import describe_files
from nvila.components.runner.handover import hand_over, read_outcome
from nvila.components.runner.work import Work
from nvila.components.serve.ports import free_port
from nvila.components.train import meeting


@pytest.mark.slow
@pytest.mark.turns(3, 1)
def test_two_nodes_train_the_model_of_one(small: Any, tmp_path: Path, image_stage: dict[str, Any]) -> None:
    """Nodes that do not find each other train two models, or wait for ever; and where ranks are must change nothing."""
    weights = []
    for nodes in (1, 2):
        job = _job(small, tmp_path / str(nodes), image_stage)
        port = free_port("127.0.0.1")
        started = [_node(job, nodes, node, port) for node in range(nodes)]
        assert [node.wait(120) for node in started] == [0] * nodes
        outcome = read_outcome(job.parent, "train-1")
        assert outcome is not None and outcome.result.steps == 6
        folder = tmp_path / str(nodes)
        assert list(folder.glob("torchrun-*")) == []
        weights.append({name: file.sha256 for name, file in describe_files(folder, ["model/**/*"]).items()})
    assert weights[0] == weights[1]


@pytest.mark.parametrize("rank", [0, 1])
def test_a_node_that_waits_for_the_others_can_be_stopped(
    small: Any, tmp_path: Path, image_stage: dict[str, Any], rank: int
) -> None:
    """Killed after minutes instead, it holds its GPUs so long and counts as a failure of the job."""
    job = _job(small, tmp_path / "out", image_stage)
    port = free_port("127.0.0.1")
    node = _node(job, 2, rank, port)
    try:
        deadline = time.monotonic() + 60
        while not (tmp_path / "out" / ("job-1.json" if rank else "job.json")).exists():
            assert time.monotonic() < deadline and node.poll() is None
            time.sleep(0.05)
        time.sleep(1)
        node.send_signal(signal.SIGTERM)
        assert node.wait(20) == Exit.PREEMPTED
    finally:
        node.kill()


def test_a_node_that_comes_twice_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pod replaced while the others wait would stand for one that is not there, and torchrun's deaf wait begins."""
    monkeypatch.setattr(meeting, "MEET_SECONDS", 4.0)
    with ThreadPoolExecutor(3) as threads:
        port = free_port("127.0.0.1")
        nodes = [threads.submit(meeting.meet, "127.0.0.1", port, 3, node) for node in (0, 1, 1)]
        assert str(nodes[0].exception()).startswith("only 2 of 3 nodes came")


def test_nodes_that_wait_outlive_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the first pod was preempted, the others ended with exit code 1, which the job may hear first."""
    monkeypatch.setattr(meeting, "MEET_SECONDS", 60.0)
    port = free_port("127.0.0.1")
    code = f"from nvila.components.train import meeting; meeting.meet('127.0.0.1', {port}, 3, 0)"
    first = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True)
    with ThreadPoolExecutor(3) as threads:
        try:
            waiting = threads.submit(meeting.meet, "127.0.0.1", port, 3, 1)
            assert first.stderr and any("2 of 3" in line for line in first.stderr)
        finally:
            first.kill()
            first.wait()
        nodes = [waiting, *(threads.submit(meeting.meet, "127.0.0.1", port, 3, node) for node in (0, 2))]
        assert [node.exception() for node in nodes] == [None, None, None]


def _job(small: Any, out: Path, stage: dict[str, Any]) -> Path:
    """A job of two processes."""
    run = {"precision": "fp32", "zero": 0, "gpus": 2, "checkpoint_seconds": 3600.0}
    settings = {"stage": stage, "run": run, "seed": 0}
    inputs = {"model": small.model, "samples": small.samples}
    out.mkdir()
    return hand_over(
        Work("train-4", "nvila.components.train.step", "k", settings, inputs, out, out / "run", Environment()), "ab"
    )


def _node(job: Path, nodes: int, rank: int, port: int) -> subprocess.Popen[bytes]:
    variables = {"PET_NNODES": nodes, "PET_NODE_RANK": rank, "PET_MASTER_ADDR": "127.0.0.1", "PET_MASTER_PORT": port}
    environment = os.environ | {name: str(value) for name, value in variables.items()}
    command = [sys.executable, "-m", "nvila.components.runner.node", str(job)]
    return subprocess.Popen(command, env=environment | {"PET_NPROC_PER_NODE": "1"})
