"""`nvila ablate prune` on the micro recipe's data: killed half-way, taken up again, told as JSON, table and page."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

pytestmark = [pytest.mark.slow, pytest.mark.turns(3, 0)]

LEFT_OUT = [f"train.stages.train-{stage}=null" for stage in (1, 2, 3)]
OPTIONS = ["--seeds", "1", "--ratios", "0.5", "--methods", "clusters,random", "--no-spoilt", "--jobs", "1"]
COMMAND = [sys.executable, "-m", "nvila.pipelines.cli", "ablate", "prune", "micro", *OPTIONS]
COMMAND += [part for override in LEFT_OUT for part in ("-o", override)]
CASES = 4
SECONDS = 300


def _run(folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*COMMAND, *options], cwd=folder, capture_output=True, text=True, timeout=SECONDS)


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int]:
    """A folder in which the command was killed outright once a case was finished; the cases finished by then."""
    folder = tmp_path_factory.mktemp("ablate")
    with (folder / "first.txt").open("w") as told:
        process = subprocess.Popen(COMMAND, cwd=folder, stdout=told, stderr=told)
    deadline = time.monotonic() + SECONDS
    while "1/4 " not in (folder / "first.txt").read_text() and process.poll() is None:
        assert time.monotonic() < deadline, (folder / "first.txt").read_text()
        time.sleep(0.1)
    assert process.poll() is None, (folder / "first.txt").read_text()
    children = psutil.Process(process.pid).children(recursive=True)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    _, alive = psutil.wait_procs(children, timeout=60)
    assert not alive, "a case that outlives the command would write beside the one that takes it up"
    return folder, len(_finished(folder))


@pytest.fixture(scope="module")
def result(killed: tuple[Path, int]) -> tuple[Path, dict[str, Any], str]:
    """The same command again, to its end."""
    folder, _ = killed
    ended = _run(folder)
    assert ended.returncode == 0, ended.stderr[-5000:]
    return folder, json.loads((folder / "runs/bench/prune.json").read_text()), ended.stdout + ended.stderr


def test_what_was_finished_when_it_was_killed_is_not_done_again(
    killed: tuple[Path, int], result: tuple[Path, dict[str, Any], str]
) -> None:
    """An experiment of an hour that starts anew after each interruption never ends on a borrowed machine."""
    folder, before = killed
    assert before >= 1 and f"{CASES} cases, {before} of them finished" in result[2]
    assert re.search(r"initialize: was there", result[2]) and len(_finished(folder)) == CASES


def test_the_result_says_what_was_done_and_by_which_rules(result: tuple[Path, dict[str, Any], str]) -> None:
    """A number whose commit, machine, rules and cost are not beside it proves nothing a month later."""
    _, told, _ = result
    assert {"command", "commit", "machine", "libraries", "rules", "recipe", "design", "table"} <= set(told)
    assert told["cpu_seconds"] > 0 and all(case["cpu_seconds"] > 0 for case in told["cases"])
    every = {(case["method"], case["schedule"]) for case in told["cases"]}
    assert every == {(method, how) for method in ("all", "clusters", "random") for how in ("epoch", "steps")}
    steps = {case["stages"]["train-4"]["steps"] for case in told["cases"] if case["schedule"] == "steps"}
    assert len(steps) == 1, "equal steps are equal"
    groups = {(row["stage"], row["source"], row["kind"]) for row in told["table"]}
    assert ("train-4", "shapes", "yes/no") in groups and ("train-5", "clips", "number") in groups


def test_one_seed_is_not_tested(result: tuple[Path, dict[str, Any], str]) -> None:
    """Without a second training nobody knows what luck is."""
    said = {row["verdict"] for row in result[1]["table"] if row["method"] == "clusters"}
    assert said == {"not tested"}


def test_table_and_page_show_every_method(result: tuple[Path, dict[str, Any], str]) -> None:
    """The page stands alone: it loads nothing, and shows a chart per source and schedule after each stage."""
    folder, _, output = result
    page = (folder / "runs/bench/prune.html").read_text()
    assert all(name in page and name in output for name in ("clusters", "random", "epoch", "steps"))
    assert page.count("<svg") == 2 * (2 + 2) and "<script" not in page and "http-equiv" in page


def test_a_plan_makes_nothing_and_knows_what_is_there(result: tuple[Path, dict[str, Any], str], tmp_path: Path) -> None:
    """Whoever asks what it would cost has not asked for the first hour of it."""
    folder, _, _ = result
    there, fresh = _run(folder, "--dry-run"), _run(tmp_path, "--dry-run")
    assert f"{CASES} are finished" in there.stdout and "in the store" in there.stdout
    assert "0 are finished" in fresh.stdout and list(tmp_path.iterdir()) == []


def test_another_recipe_does_not_reuse_a_case(result: tuple[Path, dict[str, Any], str]) -> None:
    """A case of another learning rate would be told as one of this."""
    folder, _, _ = result
    planned = _run(folder, "--dry-run", "-o", "train.stages.train-4.learning_rate=0.5")
    assert "0 are finished" in planned.stdout


def _finished(folder: Path) -> list[Path]:
    return list(folder.glob("store/ablate-case/*/manifest.json"))
