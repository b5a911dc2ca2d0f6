"""`nvila run`: a recipe's pipeline on this machine. Checks first, then runs the DAG in a child and watches it."""

from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable
from contextlib import suppress
from contextvars import copy_context
from datetime import UTC, datetime
from pathlib import Path

import psutil
from rich.console import Console

from nvila.components.contracts import locks
from nvila.components.contracts.children import how_ended
from nvila.components.contracts.environment import for_child, named
from nvila.components.contracts.errors import ConfigError
from nvila.components.contracts.exits import Exit
from nvila.components.contracts.manifest import write_atomic
from nvila.components.contracts.pipelines import Pipeline, PipelineName
from nvila.components.contracts.processes import OWNER, Process
from nvila.components.contracts.recipe.form import Form, given
from nvila.components.contracts.recipe.recipe import slices
from nvila.components.contracts.steps import PREFLIGHT
from nvila.components.contracts.text import say, visible
from nvila.components.preflight import step as preflight
from nvila.components.preflight.checks import weights_problems
from nvila.components.runner.status import Run, statuses
from nvila.components.tracking.connect import load_client
from nvila.components.tracking.redact import redact_text, tell
from nvila.pipelines.commands.overrides import asked_for, remarks
from nvila.pipelines.local.child import ARGUMENTS, GRACE_SECONDS
from nvila.pipelines.local.forks import put_client
from nvila.pipelines.local.peak_memory import MemorySampler
from nvila.pipelines.show.results import profiles, short, show_closing
from nvila.pipelines.show.summary import LOG, REPORT, Summary, write_summary
from nvila.pipelines.show.watch import Watch, print_line, read_states


def run(
    recipe: str,
    overrides: Iterable[str] = (),
    *,
    runs: Path = Path("runs"),
    store: Path = Path("store"),
    profile: str = "",
    start_from: str = "",
    wanted: PipelineName | None = None,
) -> Summary:
    """Run the recipe's pipeline and return what came of it, the exit code among it.

    Args:
        recipe: name of a shipped recipe, or path of a YAML file.
        overrides: `dotted.key=value` pairs.
        runs: folder that gets a folder for this run.
        store: folder of finished work, shared between runs.
        profile: training step of which a few optimizer steps are profiled, or `all`; empty for none.
        start_from: the whole model to fine-tune; empty for the recipe's.
        wanted: refuse a recipe of another pipeline than this.

    Raises:
        ConfigError, PreflightError: the input is wrong; nothing has been written yet.
        Unreachable: MLflow or the place of weights does not answer; nor has anything been written.
    """
    form, checked = asked_for(recipe, overrides, start_from=start_from)
    pipeline = checked.pipeline
    if wanted not in (None, pipeline.name):
        raise ConfigError(
            "the recipe makes its own model", where=recipe, do=f"Use `nvila run {recipe}`, or name a model."
        )
    if profile and profile not in (*pipeline.stages, "all"):
        raise ConfigError(
            "no such stage", where="--profile", value=profile, do=f"Name one of {', '.join(pipeline.stages)}, all."
        )
    needs = preflight.Settings.model_validate(slices(checked)[PREFLIGHT])
    preflight.refuse(preflight.problems(needs, runs.absolute(), store.absolute(), demo_can_be_built=True))
    preflight.refuse(weights_problems(needs.weights, runs.absolute()))
    preflight.refuse(preflight.start_problems(needs, runs.absolute()))
    for line in remarks(recipe, checked) + preflight.remarks(needs):
        say(line)
    with _Stop() as stop:
        run_dir = _new_run(runs.absolute(), checked.name)
        return _run_checked(form, pipeline, run_dir, store.absolute(), stop, profile)


def _run_checked(form: Form, pipeline: Pipeline, run_dir: Path, store: Path, stop: _Stop, profile: str = "") -> Summary:
    write_atomic(run_dir / OWNER, Process.this().model_dump_json())
    write_atomic(run_dir / ARGUMENTS, json.dumps(given(form, pipeline), indent=1))
    _point_latest(run_dir)
    console = Console(width=None if sys.stdout.isatty() else 140)
    where = visible(f"run {run_dir.name}: what the steps print goes to {short(run_dir / LOG)}")
    print_line(console, where)
    began = time.monotonic()
    sampler = MemorySampler(os.getpid(), run_dir.parent)
    sampler.start()
    threading.Thread(target=copy_context().run, args=(_close_abandoned, run_dir.parent)).start()
    code = _watched(run_dir, pipeline, store, console, stop, profile)
    met: set[str] = set()
    # A disk that damages it each time ends this.
    while not stop.asked and (damage := _damage_met(run_dir)) and damage not in met:
        met.add(damage)
        print_line(console, tell(f"{damage}\nthe damaged work is done again"))
        code = _watched(run_dir, pipeline, store, console, stop, profile)
    sampler.stop()
    over = Run.read(run_dir)
    exit_code = _exit_code(over, code)
    _write_report(run_dir)
    summary = write_summary(over, time.monotonic() - began, sampler.peak_pss_bytes, exit_code)
    _close_tracking(run_dir, exit_code)
    show_closing(over, summary, console)
    for line in profiles(over, profile):
        print_line(console, line)
    return summary


def _damage_met(run_dir: Path) -> str | None:
    """What the step that ended the run said of damaged work that it should have read."""
    return next((step.message for step in statuses(run_dir) if step.damaged), None)


def _watched(run_dir: Path, pipeline: Pipeline, store: Path, console: Console, stop: _Stop, profile: str = "") -> int:
    """Start the child, show its progress, pass signals on; return its exit code."""
    # Steps run one after the other here, so each may have the whole machine; idle threads must not spin.
    alone = named(threads=len(os.sched_getaffinity(0))) | {"OMP_WAIT_POLICY": "PASSIVE"}
    environment = for_child(named(store=store, run=run_dir, pipeline=pipeline.name, profile=profile), unless_set=alone)
    with (
        tempfile.TemporaryDirectory(prefix="nvila-") as python,
        (run_dir / LOG).open("a+b") as log,
        Watch(run_dir.name, lambda: read_states(run_dir, pipeline.rows), console) as watch,
    ):
        locks.share(log)  # until the last process of the run, which all have it open, is gone
        put_client(Path(python))
        # Where the user's has no `sh`, KFP needs one all the same.
        environment["PATH"] = os.pathsep.join([python, *filter(None, [environment.get("PATH")]), os.defpath])
        command = [sys.executable, "-m", "nvila.pipelines.local.child", str(run_dir), str(os.getpid()), python]
        child = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment, start_new_session=True
        )
        while child.poll() is None:
            watch.refresh()
            stop.pass_on(child)
            time.sleep(0.2)
        if child.returncode < 0 and not stop.asked:
            log.write(f"the process that runs the steps {how_ended(child.returncode)}\n".encode())
    # Asked too late, the run has come through all the same.
    return int(Exit.PREEMPTED) if stop.asked and child.returncode else child.returncode


def _close_abandoned(runs: Path) -> None:
    """End in MLflow the runs that were killed and could not do it themselves, while the steps of this one work.

    The import of MLflow takes its time; at the end of the run it is there.
    """
    from nvila.components.tracking.abandoned import close_abandoned

    try:
        load_client()
        close_abandoned(runs, _last_alive)
    except Exception as problem:
        say(redact_text(f"runs that were killed stay open in MLflow: {type(problem).__name__}: {problem}"))


def _last_alive(run_dir: Path) -> float | None:
    """When a run of this machine last said something, in seconds since the epoch; None while it lives."""
    # None as well: it was not begun by `nvila run`, or there are no locks.
    return (run_dir / LOG).stat().st_mtime if locks.is_held(run_dir / LOG) is False else None


def _write_report(run_dir: Path) -> None:
    """The report, where the step that writes it was not reached: the run was stopped or killed."""
    if (run_dir / REPORT).is_file():
        return
    from nvila.components.report.step import render

    try:
        write_atomic(run_dir / REPORT, render(Run.read(run_dir)))
    except Exception as problem:
        say(redact_text(f"no report: {type(problem).__name__}: {problem}"))


def _close_tracking(run_dir: Path, code: Exit) -> None:
    """End the parent run in MLflow. A tracking store that is down must not change how the run ended."""
    from nvila.components.tracking.runs import close_pipeline_run, is_tracked

    status = {Exit.DONE: "FINISHED", Exit.PREEMPTED: "KILLED"}.get(code, "FAILED")
    try:
        if is_tracked(run_dir):  # else no step was executed, or the parent is not ours
            close_pipeline_run(run_dir, status)
    except Exception as problem:
        say(redact_text(f"the run in MLflow stays open: {type(problem).__name__}: {problem}"))


class _Stop:
    """Collects what asks a run to stop, from its first process to its last word, which so is always said.

    The first time the steps get one SIGTERM and may save their progress; when it comes again, or they do not end, all
    of them are killed. What is ignored already (`nohup`) stays so.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)

    def __init__(self) -> None:
        self.asked = 0
        """How often."""
        self._deadline: float | None = None

    def __enter__(self) -> _Stop:
        heard = [number for number in self.SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
        self._before = {number: signal.signal(number, self._note) for number in heard}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, signum: int, frame: object) -> None:
        self.asked += 1
        if signum == signal.SIGHUP:
            _let_go_of_terminal()

    def pass_on(self, child: subprocess.Popen[bytes]) -> None:
        if self.asked and self._deadline is None:
            self._deadline = time.monotonic() + GRACE_SECONDS + 10
            child.terminate()
        if self.asked > 1 or (self._deadline is not None and time.monotonic() > self._deadline):
            _kill_all(child.pid)


def _let_go_of_terminal() -> None:
    """Write to nowhere what was for a terminal that has gone: each line would be an error."""
    for descriptor in (1, 2):
        if stat.S_ISCHR(os.fstat(descriptor).st_mode):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, descriptor)
            os.close(nowhere)


def _kill_all(leader: int) -> None:
    """End the process, its group and its descendants, those that have left the group (ranks, servers) among them."""
    with suppress(psutil.Error):
        for process in psutil.Process(leader).children(recursive=True):
            with suppress(psutil.Error):
                process.kill()
    with suppress(ProcessLookupError):
        os.killpg(leader, signal.SIGKILL)


def _exit_code(run: Run, child_code: int) -> Exit:
    """That of the first step that did not come through; else the child's own. Done is only a run of which all are."""
    if child_code == Exit.PREEMPTED:
        return Exit.PREEMPTED
    if run.trouble:
        return run.trouble.exit_code or Exit.FAULT
    if run.lost or (child_code == Exit.DONE and run.unfinished(run.pipeline.rows)):
        return Exit.FAULT
    return Exit(child_code) if child_code in list(Exit) else Exit.FAULT


def _new_run(runs: Path, recipe: str) -> Path:
    """A new folder named by the time (UTC) and the recipe."""
    runs.mkdir(parents=True, exist_ok=True)
    stem = f"{datetime.now(UTC):%Y%m%dT%H%M%SZ}-{recipe}"
    for name in (stem, *(f"{stem}-{number}" for number in range(2, 100))):
        try:
            (runs / name).mkdir()
            return runs / name
        except FileExistsError:
            continue
    raise FileExistsError(f"{runs}/{stem}")


def _point_latest(run_dir: Path) -> None:
    """`runs/latest` -> the newest run, replaced in one step."""
    fresh = run_dir.parent / f".latest.{os.getpid()}"
    fresh.unlink(missing_ok=True)
    try:
        fresh.symlink_to(run_dir.name)
        fresh.replace(run_dir.parent / "latest")
    except OSError as error:  # a folder in its place, or a file system without links
        fresh.unlink(missing_ok=True)
        say(f"{run_dir.parent / 'latest'} does not lead to this run ({error.strerror}): it lies in {run_dir}")
