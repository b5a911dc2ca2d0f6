"""The runner, in real processes around a small step: skip or work, exit codes, status files, what a signal leaves."""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from nvila.components.contracts import keys
from nvila.components.contracts.environment import Environment
from nvila.components.contracts.manifest import Manifest
from nvila.components.contracts.results.result import Other
from nvila.components.contracts.results.run import Resolution
from nvila.components.runner.code import code_digest
from nvila.components.runner.status import Status, StepStatus

STEP = """
import json, os, time
from pathlib import Path
from nvila.components.contracts.errors import DataError, Rejected
from nvila.components.contracts.progress import Progress
from nvila.components.contracts.recipe.section import Section
from nvila.components.contracts.results.result import Other
from nvila.components.contracts.step import Outcome


class Settings(Section):
    do: str = "work"
    calls: str


def run(settings, inputs, out):
    with Path(settings.calls).open("a") as log:
        log.write(json.dumps(sorted(p.name for p in out.iterdir())) + "\\n")
    (out / "half.txt").write_text("half")
    Progress("trying", 3).update(1)
    if settings.do == "wrong data":
        raise DataError("unreadable", where="a.json")
    if settings.do == "secret":
        raise RuntimeError("s3 password=hunter2 \\x1b[2J")
    if settings.do == "reject":
        raise Rejected("too bad")
    if settings.do == "fault":
        raise ZeroDivisionError("oops")
    if settings.do == "wait" and not (out / "waiting").exists():
        (out / "waiting").touch()
        time.sleep(60)
    (out / "result.txt").write_text(str(len(inputs)))
    result = Other(n=1) if out.parent.name == "try" else None
    return Outcome(kind="dataset", result=result, files=("result.txt",), measured={"speed": 2.0})
"""

TRACKING = """
import json


def record_step(run_dir, step, settings, inputs, manifest, began, ended, error, measured, recipe, told):
    if (run_dir / "tracking-is-down").exists():
        raise ConnectionError("no server")
    with (run_dir / "tracked").open("a") as log:
        log.write(json.dumps([step, manifest and manifest.digest, error, dict(measured), ended >= began]) + "\\n")


"""
"""Stands for MLflow: the real module has its tests, and takes seconds to import."""

MAIN = """
import json, sys
import tracking

sys.modules["nvila.components.tracking.runs"] = tracking
from nvila.components.runner.execute import execute

step, slices, inputs, output = sys.argv[1:]
print(json.dumps(execute(step, "nvila.trying.step", slices, json.loads(inputs), output)))
"""


@dataclass
class Bench:
    """A store, runs, and a step `nvila.trying.step` that does what its slice says."""

    root: Path
    patch: pytest.MonkeyPatch
    capture: pytest.CaptureFixture[str]

    def start(self, do: str, *, step: str = "try", asked: str | None = None) -> subprocess.Popen[str]:
        """The step in a process of its own, as a container runs it; `asked` is the step's name where it differs."""
        arguments, variables = self._prepare(do, step, "run-1")
        arguments[0] = asked or step
        return subprocess.Popen(
            [sys.executable, str(self.root / "main.py"), *arguments[:2], "{}", arguments[2]],
            env=os.environ | variables | {"PYTHONPATH": os.pathsep.join([str(self.root), *sys.path])},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(
        self,
        do: str,
        *,
        step: str = "try",
        run: str = "run-1",
        inputs: dict[str, str] | None = None,
        at_end: Callable[[Environment], None] = lambda here: None,
    ) -> tuple[int, str]:
        """Exit code and what was written to stderr, of the step in this process."""
        from nvila.components.runner.execute import execute

        (name, slices, output), variables = self._prepare(do, step, run)
        for variable, value in variables.items():
            self.patch.setenv(variable, value)
        self.capture.readouterr()
        try:
            execute(name, "nvila.trying.step", slices, inputs or {}, output, at_end=at_end)
        except SystemExit as leaving:
            return int(str(leaving.code)), self.capture.readouterr().err
        return 0, self.capture.readouterr().err

    def _prepare(self, do: str, step: str, run: str) -> tuple[list[str], dict[str, str]]:
        (self.root / "runs" / run).mkdir(parents=True, exist_ok=True)
        slices, output = self.root / "slices.json", self.root / "output" / f"{step}.json"
        given = {step: {"do": do, "calls": str(self.root / "calls")}}
        Manifest(step="resolve", key="k", kind="slices", result=Resolution(recipe={}, slices=given)).save(slices)
        variables = {"NVILA_STORE": str(self.root / "store"), "NVILA_RUN": str(self.root / "runs" / run)}
        return [step, str(slices), str(output)], variables

    @property
    def calls(self) -> list[list[str]]:
        """What each call of the step found in its folder."""
        path = self.root / "calls"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def status(self, step: str = "try", run: str = "run-1") -> dict[str, Any]:
        return dict(json.loads((self.root / "runs" / run / "steps" / f"{step}.json").read_text()))

    def tracked(self, run: str = "run-1") -> list[list[Any]]:
        return [json.loads(line) for line in (self.root / "runs" / run / "tracked").read_text().splitlines()]

    def folder(self, step: str = "try") -> Path:
        return next(path for path in (self.root / "store" / step).iterdir() if path.is_dir())


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Bench]:
    package = tmp_path / "nvila" / "trying"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "step.py").write_text(STEP)
    (tmp_path / "tracking.py").write_text(TRACKING)
    (tmp_path / "main.py").write_text(MAIN)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setitem(sys.modules, "nvila.components.tracking.runs", importlib.import_module("tracking"))
    before = signal.getsignal(signal.SIGTERM)
    yield Bench(tmp_path, monkeypatch, capsys)
    signal.signal(signal.SIGTERM, before)
    for name in ("tracking", "nvila.trying", "nvila.trying.step"):
        sys.modules.pop(name, None)
    for cached in (keys._source, keys._syntax):
        cached.cache_clear()


def test_work_is_done_once_and_then_found(bench: Bench) -> None:
    """A second run that does everything again, or a first that is taken for done, breaks resume."""
    assert bench.run("work")[0] == 0
    first = Manifest.load(bench.root / "output" / "try.json")
    assert bench.status() | {"started": 0, "ended": 0, "pid": 0} == {
        "name": "try",
        "pipeline": "lifecycle",
        "status": "done",
        "exit_code": 0,
        "manifest": f"{bench.folder()}/manifest.json",
        "message": None,
        "damaged": False,
        "error": None,
        **{"started": 0, "ended": 0, "pid": 0},
    }
    assert (first.path("result.txt").read_text(), first.result) == ("0", Other(n=1))
    assert sorted(first.files) == ["result.txt"]
    assert bench.tracked() == [["try", first.digest, None, {"speed": 2.0}, True]]
    code, _ = bench.run("work", run="run-2")
    assert (code, len(bench.calls)) == (0, 1)
    status = bench.status(run="run-2")
    assert (status["status"], status["exit_code"]) == ("cached", 0)
    assert Manifest.load(bench.root / "output" / "try.json") == first
    assert not (bench.root / "runs" / "run-2" / "tracked").exists()


def test_other_code_than_the_pipelines_is_refused(bench: Bench) -> None:
    """An image of another commit would read slices and manifests that it does not know."""
    bench.patch.setenv("NVILA_CODE", code_digest())
    assert bench.run("work")[0] == 0
    bench.patch.setenv("NVILA_CODE", "0" * 16)
    code, errors = bench.run("work")
    assert code == 2 and "holds other code" in errors and "0" * 16 in errors


def test_the_world_is_prepared_before_the_key_is_taken(bench: Bench) -> None:
    """The key would be that of a world without the data, and the second run would do everything again."""
    step, made = importlib.import_module("nvila.trying.step"), bench.root / "made"
    bench.patch.setattr(step, "prepare", lambda settings: made.write_text(settings.do), raising=False)
    bench.patch.setattr(step, "external", lambda settings: {"made": made.read_text()}, raising=False)
    assert [bench.run("work")[0], bench.run("work", run="run-2")[0]] == [0, 0]
    assert len(bench.calls) == 1


def test_a_step_that_makes_the_same_again_wakes_none_behind_it(bench: Bench) -> None:
    """An edit of how weights are fetched would train five stages again, though the weights are the same."""
    made = bench.root / "output" / "try.json"
    bench.run("work")
    first = Manifest.load(made)
    (bench.root / "nvila" / "trying" / "step.py").write_text(f"{STEP}\nEDITED = 1\n")
    keys._syntax.cache_clear()
    bench.run("work", run="run-2")
    second = Manifest.load(made)
    assert len(bench.calls) == 2 and second.key != first.key
    assert second.digest == first.digest  # which is what keys of steps behind it hold


def test_an_input_is_recorded_and_belongs_to_the_key(bench: Bench) -> None:
    """Lineage is a walk over manifests: an input that is not named there is lost."""
    bench.run("work")
    made = bench.root / "output" / "try.json"
    bench.run("work", step="next", inputs={"data": str(made)})
    first, second = Manifest.load(made), Manifest.load(bench.root / "output" / "next.json")
    assert (second.inputs["data"].digest, second.inputs["data"].step) == (first.digest, "try")
    assert Manifest.load(second.inputs["data"].uri) == first
    bench.run("work", step="next")
    assert Manifest.load(bench.root / "output" / "next.json").key != second.key


@pytest.mark.parametrize(
    ("do", "code", "status", "message"),
    [
        ("wrong data", 2, "failed", "a.json: unreadable"),
        ("reject", 3, "rejected", "too bad"),
        ("fault", 1, "failed", "ZeroDivisionError: oops"),
    ],
)
def test_a_failure_has_its_exit_code_and_its_words(bench: Bench, do: str, code: int, status: str, message: str) -> None:
    """A launcher retries by exit code; a user's error shown as a traceback, or retried, wastes both their time."""
    process = bench.start(do)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == code
    assert errors.rstrip().endswith(f"try: {message}")
    assert ("Traceback" in errors) == (code == 1)
    assert (bench.status()["status"], bench.status()["exit_code"]) == (status, code)
    assert bench.status()["message"] == message
    assert not (bench.root / "output").exists() and not (bench.folder() / "manifest.json").exists()
    assert [line[1:3] for line in bench.tracked()] == [[None, message.removeprefix("ZeroDivisionError: ")]]


@pytest.mark.parametrize(("do", "calls_in_one_run"), [("wrong data", 1), ("reject", 1), ("fault", 2)])
def test_a_verdict_is_not_asked_for_twice_in_a_run(bench: Bench, do: str, calls_in_one_run: int) -> None:
    """A retried pod must not repeat hours towards the same verdict; a fault, or a new run, must try again."""
    first = bench.run(do)[0], bench.status()["message"]
    again = bench.run(do)[0], bench.status()["message"]
    assert first == again
    assert len(bench.calls) == calls_in_one_run
    bench.run(do, run="run-2")
    assert len(bench.calls) == calls_in_one_run + 1


def test_what_a_step_says_at_its_end_holds_no_secret(bench: Bench) -> None:
    """The status file goes into the report and the summary, and what is printed into the log that people read."""
    code, said = bench.run("secret")
    assert code == 1 and "Traceback" in said and "hunter2" not in said and "\x1b" not in said
    assert bench.status()["message"] == "RuntimeError: s3 password=[redacted] \x1b[2J"


def test_a_preempted_step_resumes_in_its_folder(bench: Bench) -> None:
    """SIGTERM is not a failure: code 75, no tombstone, and the same command goes on where it was."""
    process = bench.start("wait")
    deadline = time.monotonic() + 30
    while not list(bench.root.glob("store/try/*/waiting")) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=30)
    assert process.returncode == 75
    assert (bench.status()["status"], bench.status()["exit_code"]) == ("preempted", 75)
    assert bench.run("wait")[0] == 0
    assert bench.calls == [[], ["half.txt", "waiting"]]


def test_interrupted_work_is_resumed_and_damaged_work_is_not(bench: Bench) -> None:
    """Half a folder is a checkpoint; a finished one whose file has shrunk since cannot be trusted at all."""
    bench.run("fault")
    bench.run("fault")
    assert bench.calls == [[], ["half.txt"]]
    bench.run("work")
    folder = next(path.parent for path in bench.root.glob("store/try/*/result.txt"))
    (folder / "result.txt").write_text("")
    bench.run("work")
    assert bench.calls[2:] == [[], []]
    assert (folder / "result.txt").read_text() == "0"


@pytest.mark.parametrize("step", ["register", "rollout", "report"])
def test_steps_that_act_on_the_world_always_run(bench: Bench, step: str) -> None:
    """A cached rollout leaves a dead endpoint dead."""
    for _ in range(2):
        assert bench.run("work", step=step)[0] == 0
        assert bench.status(step)["status"] == "done"
    assert len(bench.calls) == 2


@pytest.mark.parametrize("step", ["register", "rollout", "report"])
def test_what_acts_for_a_run_is_that_runs_own(bench: Bench, step: str) -> None:
    """Of two runs at once one found the other's report in its folder, and recorded it in MLflow as its own; a run whose
    rollout was done lost its endpoint from the summary while the other's was under way."""
    for run in ("run-1", "run-2"):
        assert bench.run("work", step=step, run=run)[0] == 0
    first, second = (bench.status(step, run)["manifest"] for run in ("run-1", "run-2"))
    assert first != second
    assert bench.run("work", run="run-1")[0] == bench.run("work", run="run-2")[0] == 0
    assert bench.status(run="run-1")["manifest"] == bench.status(run="run-2")["manifest"], "other work is shared"


def test_tracking_that_is_down_loses_nothing(bench: Bench) -> None:
    """Hours of training must not fail on a tracking server; but it must be said."""
    (bench.root / "runs" / "run-1").mkdir(parents=True)
    (bench.root / "runs" / "run-1" / "tracking-is-down").touch()
    code, errors = bench.run("work")
    assert code == 0
    assert "try: not tracked in MLflow: ConnectionError: no server" in errors
    assert Manifest.load(bench.root / "output" / "try.json").path("result.txt").exists()


def test_progress_of_a_step_is_told_to_its_run(bench: Bench) -> None:
    """Without the file the terminal shows nothing for minutes."""
    bench.run("wrong data")
    progress = json.loads((bench.root / "runs" / "run-1" / "progress" / "try.json").read_text())
    assert (progress["what"], progress["total"]) == ("trying", 3)
    assert "NVILA_PROGRESS_FILE" not in os.environ


def test_a_recipe_without_the_step_is_refused(bench: Bench) -> None:
    """A step that runs with defaults because its slice is missing does other work than asked."""
    process = bench.start("work", asked="other")
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 2
    assert "no slice for step other" in errors and "Traceback" not in errors


@pytest.mark.parametrize(("do", "code"), [("work", 0), ("reject", 3), ("fault", 1)])
def test_the_last_thing_is_done_however_the_step_ends(bench: Bench, do: str, code: int) -> None:
    """The exit task closes the run: a report that cannot be drawn must not leave jobs running."""
    seen: list[str] = []
    assert bench.run(do, at_end=lambda here: seen.append(bench.status()["status"]))[0] == code
    assert len(seen) == 1 and seen[0] != "running"


def test_a_damaged_input_stops_its_reader_and_is_made_again(bench: Bench) -> None:
    """A flipped bit of equal size was trained on; found out, it must not end every further run at the same place."""
    bench.run("work")
    made = bench.root / "output" / "try.json"
    step = importlib.import_module("nvila.trying.step")
    genuine = step.run
    reads = lambda settings, inputs, out: (inputs["data"].path("result.txt"), genuine(settings, inputs, out))[1]  # noqa: E731
    (bench.folder() / "result.txt").write_text("1")
    with bench.patch.context() as patch:
        patch.setattr(step, "run", reads)
        code, errors = bench.run("work", step="next", inputs={"data": str(made)})
    assert code == 1 and "result.txt: damaged output of step try: its bytes" in errors
    assert bench.status("next")["damaged"] is True and bench.status("next")["status"] == "failed"
    code, errors = bench.run("work")
    assert code == 0 and "try: damaged, to be done again: " in errors and "result.txt" in errors
    assert bench.calls[-1] == [] and (bench.folder() / "result.txt").read_text() == "0"
    assert bench.run("work", step="next", inputs={"data": str(made)})[0] == 0


@pytest.mark.parametrize("name", ["manifest.json", "tombstone.json"])
@pytest.mark.parametrize("content", [b"", b"{", bytes(40), b"\xff\xfe", b"[]", None])
@pytest.mark.parametrize("step", ["try", "register"])
def test_a_torn_record_of_the_store_ends_no_run(bench: Bench, name: str, content: bytes | None, step: str) -> None:
    """A machine that went down left an empty file, and each further run failed on it."""
    bench.run("work" if name.startswith("manifest") else "reject", step=step)
    (bench.folder(step) / name).unlink()
    if content is None:
        (bench.folder(step) / name).mkdir()
    else:
        (bench.folder(step) / name).write_bytes(content)
    assert bench.run("work" if name.startswith("manifest") else "reject", step=step)[0] in (0, 3)
    assert len(bench.calls) == 2


def test_a_manifest_edited_by_hand_is_not_believed(bench: Bench) -> None:
    """An accuracy of 0.99 written into the manifest went through the gate."""
    bench.run("work")
    path = bench.folder() / "manifest.json"
    path.write_text(path.read_text().replace('"n": 1', '"n": 99'))
    code, errors = bench.run("work")
    assert code == 0 and "damaged or edited" in errors
    assert Manifest.load(path).result == Other(n=1) and len(bench.calls) == 2


def test_the_manifest_says_where_it_was_made_and_the_key_does_not(bench: Bench) -> None:
    """Other threads round differently: one must see it, and nothing may be done again for it."""
    bench.patch.setenv("OMP_NUM_THREADS", "3")
    bench.run("work")
    first = Manifest.load(bench.root / "output" / "try.json")
    assert first.machine["threads"] == 3 and first.machine["cpu"]
    assert first.model_copy(update={"machine": {}}).digest == first.digest
    bench.patch.setenv("OMP_NUM_THREADS", "1")
    bench.run("work", run="run-2")
    assert len(bench.calls) == 1


def test_a_service_that_is_away_leaves_no_verdict(bench: Bench) -> None:
    """Exit code 2 and a tombstone would bury the step for somebody's maintenance."""
    from nvila.components.contracts.errors import Unreachable

    step, away = importlib.import_module("nvila.trying.step"), [True]
    work = step.run

    def run(settings: Any, inputs: Any, out: Path) -> Any:
        if away:
            raise Unreachable("no success in 5 tries", where="s3://bucket/key")
        return work(settings, inputs, out)

    bench.patch.setattr(step, "run", run)
    assert bench.run("work")[0] == 75
    assert (bench.status()["status"], bench.status()["exit_code"]) == ("preempted", 75)
    assert bench.status()["message"].startswith("s3://bucket/key: no success")
    assert not list(bench.root.rglob("tombstone.json"))
    away.clear()
    assert bench.run("work")[0] == 0, "the same command goes on"


def test_work_on_something_else_than_the_key_says_is_not_kept(bench: Bench) -> None:
    """Weights that are replaced between key and download would be found under the old ones' key for ever."""
    step, weights = importlib.import_module("nvila.trying.step"), bench.root / "weights"
    weights.write_text("old")
    work = step.run

    def run(settings: Any, inputs: Any, out: Path) -> Any:
        if settings.do == "replace":
            weights.write_text("new")
        return dataclasses.replace(work(settings, inputs, out), read={"weights": weights.read_text()})

    bench.patch.setattr(step, "external", lambda settings: {"weights": weights.read_text()}, raising=False)
    bench.patch.setattr(step, "run", run)
    code, errors = bench.run("replace")
    assert code == 75 and "replaced while it worked (got ['weights'])" in errors
    assert not list((bench.root / "store").rglob("result.txt"))
    assert bench.run("replace")[0] == 0


def test_a_step_that_is_left_out_hands_its_input_on(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next step would find no model; or a copy of it would take its space and be no part of the lineage."""
    from nvila.components.runner.execute import execute

    made, slices, output = tmp_path / "made.json", tmp_path / "slices.json", tmp_path / "handed_on.json"
    Manifest(step="train-2", key="k", kind="model").save(made)
    left_out = Resolution(recipe={}, slices={"train-3": None})
    Manifest(step="resolve", key="k", kind="slices", result=left_out).save(slices)
    monkeypatch.setenv("NVILA_STORE", str(tmp_path / "store"))
    monkeypatch.setenv("NVILA_RUN", str(tmp_path / "runs" / "r"))
    execute("train-3", "nvila.components.train.step", str(slices), {"model": str(made)}, str(output))
    assert Manifest.load(output).digest == Manifest.load(made).digest
    told = StepStatus.read(tmp_path / "runs" / "r", "train-3")
    assert (told.status, told.manifest) == (Status.NOT_ASKED_FOR, None)
    assert not (tmp_path / "store" / "train-3").exists()
