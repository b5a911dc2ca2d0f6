"""Curves of a stage in MLflow before it has ended."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
from test_runs import children, manifest, record

from nvila.components.contracts.errors import Unreachable
from nvila.components.tracking import live, runs
from nvila.components.tracking.connect import connected
from nvila.components.tracking.live import Live


def write(folder: Path, steps: range) -> None:
    """What a stage writes in these optimizer steps."""
    folder.mkdir(exist_ok=True)
    attempt = {"began": 1.0, "startup_seconds": 1.0, "processes": 1, "device": "cpu"}
    reading = {"seconds": 2.0, "loss": 1.0, "lr": 0.1, "samples": 8, "tokens": 30, "places": 40, "operations": 4e9}
    reading |= {"time": 7.5 + steps[-1], "step": steps[-1], "waited_seconds": 0.5, "rss_bytes": 9}
    with (folder / "loss.jsonl").open("a") as losses, (folder / "meter.jsonl").open("a") as meter:
        meter.write(json.dumps(attempt) + "\n" if steps[0] == 1 else "")
        meter.write(json.dumps(reading) + "\n")
        losses.writelines(json.dumps({"step": step, "loss": 1 / step}) + "\n" for step in steps)


def curve(run: Path, name: str) -> list[int]:
    """Optimizer steps of a curve of the only child."""
    (child,) = children(run)
    with connected(run.parent) as client:
        return sorted(one.step for one in client.get_metric_history(child.info.run_id, f"train-1/curve/{name}"))


def until(true: Any) -> None:
    deadline = time.monotonic() + 60
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_stage_is_seen_while_it_is_trained(
    tracked_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stage of a week was an empty page until its end; and at the end no point may stand there twice."""
    monkeypatch.setattr(live, "EVERY_SECONDS", 0.05)
    folder = tmp_path / "store"
    with (following := Live(tracked_run, "train-1", folder, time.time() - 1)):
        write(folder, range(1, 4))
        until(lambda: following.told == 3)
        (child,) = children(tracked_run)
        assert child.info.status == "RUNNING" and curve(tracked_run, "loss") == [1, 2, 3]
        write(folder, range(4, 6))
        until(lambda: following.told == 5)
    write(folder, range(6, 8))
    record(tracked_run, "train-1", manifest=manifest(folder, "train-1"), told=following.told)
    (child,) = children(tracked_run)
    assert child.info.status == "FINISHED" and curve(tracked_run, "loss") == [1, 2, 3, 4, 5, 6, 7]
    assert curve(tracked_run, "tokens_per_second") == [3, 5, 7]


def test_training_goes_on_without_mlflow(
    tracked_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A tracking server that is away is no reason to lose a stage, nor to say so twice a minute; what it has missed is
    told when the step has ended."""
    asked: list[int] = []

    def away(*_: Any) -> int:
        asked.append(1)
        raise Unreachable("MLflow at http://nowhere does not answer")

    folder = tmp_path / "store"
    monkeypatch.setattr(live, "EVERY_SECONDS", 0.01)
    with monkeypatch.context() as patch:
        patch.setattr(runs, "add_curve", away)
        with (following := Live(tracked_run, "train-1", folder, time.time() - 1)):
            write(folder, range(1, 3))
            until(lambda: len(asked) > 3)
    said = "".join(capsys.readouterr())
    assert said.count("not in MLflow yet: MLflow at http://nowhere does not answer") == 1
    record(tracked_run, "train-1", manifest=manifest(folder, "train-1"), told=following.told)
    assert curve(tracked_run, "loss") == [1, 2]


def test_what_an_earlier_attempt_wrote_is_not_told(
    tracked_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A resume cuts the logs back to its checkpoint: steps behind it would stand there twice, with other losses;
    and the processes are not forked yet, beside which a thread must not import."""
    monkeypatch.setattr(live, "EVERY_SECONDS", 0.01)
    folder = tmp_path / "store"
    write(folder, range(1, 9))
    with Live(tracked_run, "train-1", folder, time.time() + 1):
        time.sleep(0.2)
    assert not (tracked_run / "mlflow.json").exists()


def test_a_step_is_told_when_it_is_measured(tracked_run: Path, tmp_path: Path) -> None:
    """Losses come each step and measures every few: a measure of a step whose loss was told already would be lost."""
    folder = tmp_path / "store"
    write(folder, range(1, 3))
    with (folder / "loss.jsonl").open("a") as losses:
        losses.write('{"step": 3, "loss": 0.5}\n')
    assert runs.add_curve(tracked_run, "train-1", folder, time.time(), -1) == 2
    assert curve(tracked_run, "loss") == [1, 2]


def test_a_long_stage_does_not_fill_the_store(tracked_run: Path, tmp_path: Path) -> None:
    """A week of steps, four numbers each, would be millions of rows."""
    folder = tmp_path / "store"
    write(folder, range(1, 500))
    assert runs.add_curve(tracked_run, "train-1", folder, time.time(), -1) == 499
    steps = curve(tracked_run, "loss")
    assert len(steps) <= runs.LIVE_POINTS + 1 and steps[-1] == 499
