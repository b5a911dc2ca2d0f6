"""A step's work handed to another process and back: the same manifest as here, the same errors, the same exit codes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from nvila.components.contracts import keys
from nvila.components.contracts.environment import Environment
from nvila.components.contracts.errors import DataError, NvilaError, Preempted, Rejected
from nvila.components.contracts.exits import Exit
from nvila.components.contracts.manifest import Manifest
from nvila.components.runner import execute, handover
from nvila.components.runner.execute import perform
from nvila.components.runner.work import Work

STEP = """
import os, time
from nvila.components.contracts.errors import Rejected
from nvila.components.contracts.progress import Progress
from nvila.components.contracts.recipe.section import Section
from nvila.components.contracts.results.result import Other
from nvila.components.contracts.step import Outcome


class Settings(Section):
    do: str = "work"


def run(settings, inputs, out):
    if settings.do == "reject":
        raise Rejected("too bad")
    if settings.do == "fault":
        raise ZeroDivisionError("oops")
    if settings.do == "wait":
        (out / "waiting").touch()
        time.sleep(60)
    Progress("elsewhere", 2).update(1)
    (out / "deep").mkdir(exist_ok=True)
    (out / "deep" / "result.txt").write_text("made")
    told = Other(pair=(1, 2), share=0.1, inputs={n: m.digest for n, m in inputs.items()})
    return Outcome(kind="dataset", result=told, measured={"seconds": 2.5})


def join(settings, inputs, out):
    (out / f"joined-{os.environ['PET_NODE_RANK']}").touch()
"""

SITE = """
import subprocess, sys, uuid
from nvila.components.runner.handover import hand_over, read_outcome, read_verdict

codes = []


def takes(work):
    return not work.step.startswith("light")


def run(work):
    job = hand_over(work, uuid.uuid4().hex)
    codes.append(subprocess.run([sys.executable, "-m", "nvila.components.runner.node", str(job)]).returncode)
    if codes[-1]:
        raise read_verdict(job.parent)
    return read_outcome(job.parent, work.step)
"""


@dataclass
class Bench:
    """Performs the step `nvila.elsewhere.step`, here or by the site `nvila.elsewhere.site`."""

    root: Path
    patch: pytest.MonkeyPatch

    def perform(self, do: str = "work", *, site: str = "", step: str = "try", store: str = "store") -> Manifest:
        self.patch.setenv("NVILA_SITE", site)
        self.patch.setenv("NVILA_STORE", str(self.root / store))
        self.patch.setenv("NVILA_RUN", str(self.root / "runs" / "r1"))
        given = Manifest(step="before", key="k", kind="dataset", folder=str(self.root))
        return perform(Environment.read(), step, "nvila.elsewhere.step", {"do": do}, {"samples": given})[0]

    def assign(self, do: str = "work") -> Path:
        """The path of an assignment that no node has seen yet."""
        work = Work(
            step="try",
            module="nvila.elsewhere.step",
            key="k" * 64,
            settings={"do": do},
            inputs={},
            out=self.root / "out",
            run_dir=self.root / "runs" / "r1",
            here=Environment(),
        )
        return handover.hand_over(work, "ab")

    def node(self, job: Path, **variables: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "nvila.components.runner.node", str(job)]
        return subprocess.Popen(command, env=os.environ | variables, stderr=subprocess.PIPE, text=True)


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bench]:
    package = tmp_path / "nvila" / "elsewhere"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "step.py").write_text(STEP)
    (package / "site.py").write_text(SITE)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    for name in ("PET_NODE_RANK", "NVILA_SITE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(execute, "_track", lambda *arguments: None)
    yield Bench(tmp_path, monkeypatch)
    for name in [name for name in sys.modules if name.startswith("nvila.elsewhere")]:
        sys.modules.pop(name)
    for cached in (keys._source, keys._syntax):
        cached.cache_clear()


def test_where_the_work_is_done_changes_nothing_of_its_identity(bench: Bench) -> None:
    """A model trained on a cluster would be another model than the same one trained here, and everything runs again."""
    here = bench.perform(store="here")
    there = bench.perform(store="there", site="nvila.elsewhere.site")
    assert (there.key, there.digest, sorted(there.files)) == (here.key, here.digest, ["deep/result.txt"])
    assert json.loads((bench.root / "runs/r1/progress/try.json").read_text())["what"] == "elsewhere"


def test_light_steps_stay_here(bench: Bench) -> None:
    """A job for a step of a second takes minutes."""
    bench.perform(site="nvila.elsewhere.site", step="light")
    assert not list(bench.root.glob("store/light/*/.job"))


@pytest.mark.parametrize(
    ("do", "kind", "code", "message"),
    [("reject", Rejected, Exit.REJECTED, "too bad"), ("fault", NvilaError, Exit.FAULT, "ZeroDivisionError: oops")],
)
def test_errors_come_back_as_they_were(bench: Bench, do: str, kind: type[NvilaError], code: Exit, message: str) -> None:
    """A refusal that arrives as a fault is retried, and its reason is lost."""
    with pytest.raises(kind, match=message) as caught:
        bench.perform(do, site="nvila.elsewhere.site")
    assert caught.value.exit_code == code
    assert sys.modules["nvila.elsewhere.site"].codes == [int(code)]


def test_a_site_that_is_not_there_is_the_users_error(bench: Bench) -> None:
    """Falling back to this process would train on a pod without a GPU."""
    with pytest.raises(NvilaError, match="NVILA_SITE") as caught:
        bench.perform(site="nvila.no.such.site")
    assert caught.value.exit_code == Exit.USER


def test_other_code_in_the_job_is_refused(bench: Bench) -> None:
    """The manifest would name code that has not made the files."""
    job = bench.assign()
    job.write_text(job.read_text().replace(json.loads(job.read_text())["code"], "0" * 16))
    node = bench.node(job)
    assert node.wait(30) == Exit.USER
    assert "other code" in str(handover.read_verdict(job.parent))
    assert handover.read_outcome(job.parent, "heavy") is None


def test_a_node_that_is_stopped_says_so(bench: Bench) -> None:
    """Exit code 75 is what the job's failure policy starts again without counting."""
    job = bench.assign("wait")
    node = bench.node(job)
    _wait_for(bench.root / "out" / "waiting")
    node.send_signal(signal.SIGTERM)
    assert node.wait(30) == Exit.PREEMPTED
    assert isinstance(handover.read_verdict(job.parent), Preempted)


def test_a_node_that_is_started_again_forgets_its_last_verdict(bench: Bench) -> None:
    """A job that came through in the second attempt must not be reported with the words of the first."""
    job = bench.assign()
    handover.write_verdict(job.parent, 0, Preempted("moved"))
    assert bench.node(job).wait(30) == Exit.DONE
    assert handover.read_verdict(job.parent) is None
    made = handover.read_outcome(job.parent, "heavy")
    assert made is not None and made.measured == {"seconds": 2.5}


def test_further_nodes_join_and_leave_the_outcome_to_the_first(bench: Bench) -> None:
    """Two nodes that both write the outcome write over each other's."""
    job = bench.assign()
    assert bench.node(job, PET_NODE_RANK="1").wait(30) == Exit.DONE
    assert (bench.root / "out" / "joined-1").exists()
    assert handover.read_outcome(job.parent, "heavy") is None


def test_the_verdict_that_explains_most_counts(tmp_path: Path) -> None:
    """Nodes that are stopped because one has failed say only that they were stopped."""
    errors: list[tuple[int, NvilaError]] = [
        (0, Preempted("stopped")),
        (2, DataError("unreadable")),
        (10, NvilaError("a")),
    ]
    for node, error in errors:
        handover.write_verdict(tmp_path, node, error)
    found: Any = handover.read_verdict(tmp_path)
    assert (type(found), found.exit_code, str(found)) == (DataError, Exit.USER, "unreadable")


@pytest.mark.parametrize("attempt", ["../../other", "", "a/b"])
def test_an_attempt_cannot_lead_elsewhere(tmp_path: Path, attempt: str) -> None:
    """Its name is read from an object that others may have written."""
    with pytest.raises(NvilaError, match="attempt"):
        handover.folder_of(tmp_path, attempt)


def _wait_for(path: Path) -> None:
    deadline = time.monotonic() + 20
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} was not written"
        time.sleep(0.02)


def test_answers_that_a_crash_has_emptied_are_none(tmp_path: Path) -> None:
    """Every run after that ended with a traceback of the parser, for as long as the job's folder was there."""
    (tmp_path / handover.OUTCOME).touch()
    (tmp_path / "verdict-0.json").touch()
    handover.write_verdict(tmp_path, 1, Rejected("known"))
    assert handover.read_outcome(tmp_path, "heavy") is None
    assert str(handover.read_verdict(tmp_path)) == "known"
