"""The compiled package by the interpreter of the cluster tests, its executors as processes of this machine."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

sys.path.append(str(Path(__file__).parents[1] / "cluster"))
from interpreter import Call, Interpreter
from kube import wait_for

from nvila.components.contracts.environment import name_of
from nvila.components.contracts.placement import parameters
from nvila.components.contracts.recipe.form import Form, fill_in
from nvila.components.contracts.site import Site
from nvila.components.contracts.steps import PREFLIGHT, REPORT, RESOLVE, ROWS
from nvila.components.report.close_run import ending
from nvila.components.runner.status import Run, Status
from nvila.pipelines.compile import names as site
from nvila.pipelines.compile.package import RETRIES, compiled


@dataclass
class Processes:
    """Where executors run."""

    folder: Path
    started: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def start(self, call: Call) -> Callable[[], int]:
        """The volume is the folder; Python is this one."""
        call.folder.mkdir(parents=True, exist_ok=True)
        given = {one["name"]: one["value"].replace(site.MOUNT, str(self.folder)) for one in call.container["env"]}
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        environment = os.environ | given | {name_of("run_id"): "r1", "PATH": path}
        with (call.folder / f"{call.attempt}.log").open("wb") as log:
            process = subprocess.Popen(
                [*call.container["command"], *call.container["args"]],
                env=environment,
                stdout=log,
                stderr=log,
                start_new_session=True,
                cwd=self.folder,
            )
        self.started.append(process)
        return process.wait

    def stop(self) -> None:
        """As in a pod: the whole group."""
        for process in self.started:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGTERM)


@pytest.fixture(scope="module")
def package() -> tuple[dict[str, Any], dict[str, Any]]:
    """As for a cluster, so that steps hold their code against the package's."""
    return compiled("registry.example/nvila:1", "registry.example/nvila-quantize:1")


def test_a_refused_form_is_told_once_and_tried_to_the_end_of_the_policy(
    package: tuple[dict[str, Any], dict[str, Any]], tmp_path: Path
) -> None:
    """A package whose containers do not start, or whose exit task waits for success, is found on a cluster only."""
    run = Interpreter(package, Processes(tmp_path), tmp_path / "kfp", {})
    assert run.run(recipe="micro", overrides='{"evaluate": {"limitt": 1}}') == "FAILED"
    attempts = {name: one.attempts for name, one in run.ended.items() if one.attempts}
    assert attempts == {RESOLVE: RETRIES + 1, REPORT: 1}
    assert {run.ended[name].state for name in ROWS if name not in attempts} == {"SKIPPED"}
    assert run.ended[REPORT].state == "SUCCEEDED"
    logs = [(tmp_path / "kfp" / RESOLVE / f"{attempt}.log").read_text() for attempt in range(RETRIES + 1)]
    assert all("limitt" in log for log in logs), logs


def test_a_run_that_is_terminated_starts_nothing_but_its_exit_task(
    package: tuple[dict[str, Any], dict[str, Any]], tmp_path: Path
) -> None:
    """What `resolve` puts out has to be there for the next step under the very names that it is asked for by."""
    place = Processes(tmp_path)
    run = Interpreter(package, place, tmp_path / "kfp", {})
    with ThreadPoolExecutor(1) as thread:
        state = thread.submit(run.run, recipe="micro")
        wait_for(lambda: state.done() or list((tmp_path / "store" / PREFLIGHT).glob("*")), "it does not begin", 300)
        run.terminate()
        assert state.result() == "CANCELLED"
    assert run.ended[RESOLVE].parameters == parameters(fill_in(Form(recipe="micro")), Site())
    attempts = {name: one.attempts for name, one in run.ended.items() if one.attempts}
    assert attempts == {RESOLVE: 1, PREFLIGHT: 1, REPORT: 1}
    ended = Run.read(tmp_path / "runs" / "r1")
    assert ended.step(PREFLIGHT).status == Status.PREEMPTED
    assert ending(ended, "CANCELLED", None).outcome == "stopped"
