"""`nvila submit`: checks a recipe, uploads the pipeline where asked, starts a run on a cluster, and waits for it."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import yaml
from rich.console import Console

from nvila.components.contracts.errors import ConfigError
from nvila.components.contracts.exits import Exit
from nvila.components.contracts.pipelines import Pipeline, PipelineName
from nvila.components.contracts.recipe.form import given
from nvila.components.contracts.recipe.reader import shipped
from nvila.components.contracts.recipe.recipe import slices
from nvila.components.contracts.recipe.rollout import TARGETS
from nvila.components.contracts.steps import ROWS
from nvila.components.tracking.redact import tell
from nvila.pipelines.commands.overrides import asked_for
from nvila.pipelines.kubeflow.server import Conflict, Server, patiently, plain
from nvila.pipelines.show.watch import StepState, Watch, print_line

if TYPE_CHECKING:
    from kfp_server_api import V2beta1PipelineTaskDetail, V2beta1PipelineVersion, V2beta1Run

POLL_SECONDS = 5.0
PATIENCE_SECONDS = 1800.0
"""How long `--wait` bears with a server that is down: an upgrade of the cluster's control plane."""
_ENDED = {"SUCCEEDED": Exit.DONE, "SKIPPED": Exit.DONE, "FAILED": Exit.FAULT, "CANCELED": Exit.PREEMPTED}
_NO_YEAR = 1970
_STATUS = {"SUCCEEDED": "done", "CANCELING": "cancelling", "CANCELED": "cancelled", "PENDING": "waiting"}


@dataclass(frozen=True)
class Version:
    """Which compiled pipeline a run takes."""

    image: str = ""
    """Image of the steps; empty takes the newest version that is installed on the cluster."""
    quantize_image: str = ""

    @property
    def own(self) -> bool:
        """Whether it is compiled here."""
        return bool(self.image or self.quantize_image)


@dataclass(frozen=True)
class Wanted:
    """How the run is called and where it runs."""

    namespace: str | None = None
    experiment: str = "nvila"
    run_name: str | None = None
    service_account: str | None = None


def upload(
    server: Server, version: Version, namespace: str | None, console: Console, pipeline: PipelineName = "lifecycle"
) -> V2beta1PipelineVersion:
    """Make sure that the pipeline compiled here is on the server, and return its version there.

    The version's name is the digest of its content, so the same content is never uploaded twice.

    Raises:
        ConfigError: no image, or a name that is taken.
    """
    from nvila.pipelines.compile.package import compiled, resource_name, version_name

    if not (version.image and version.quantize_image):
        raise ConfigError("an upload needs the images of the steps", where="--image and --quantize-image")
    spec, platform = compiled(version.image, version.quantize_image, pipeline)
    called, name, about = resource_name(pipeline), version_name(spec, platform), spec["pipelineInfo"]["description"]
    there = server.pipeline(called, [namespace])
    if there is None:
        try:
            there = server.create_pipeline(called, spec["pipelineInfo"]["displayName"], about, namespace)
        except Conflict as error:
            there = server.pipeline(called, [namespace])
            if there is None:
                raise ConfigError(
                    f"a pipeline {called} is there, but not yours to see: {error}", where="--namespace", value=namespace
                ) from None
    if found := _version(server, there.pipeline_id, name):
        print_line(console, f"{called}: version {name} is there already")
        return found
    with TemporaryDirectory() as folder:
        file = Path(folder, f"{name}.yaml")
        file.write_text(yaml.safe_dump_all([spec, platform]), encoding="utf-8")
        try:
            made = server.upload_version(there.pipeline_id, name, f"image {version.image}", file)
        except Conflict:  # the same upload from elsewhere was faster
            made = _version(server, there.pipeline_id, name)
            if made is None:
                raise
    print_line(console, f"{called}: version {name} uploaded")
    return made


def submit(
    recipe: str,
    overrides: Iterable[str],
    server: Server,
    version: Version,
    wanted: Wanted,
    console: Console,
    *,
    data_uri: str = "",
    model_name: str = "",
    start_from: str = "",
    target: str = "",
    wait: bool = False,
) -> int:
    """Start a run and return the exit code: 0 once it is started, or with `wait` that of the run (see `Exit`).

    Raises:
        ConfigError: recipe, options, token or namespace are wrong; nothing has been started.
        NvilaError: the server is down.
    """
    import kfp_server_api as api

    if not recipe:
        raise ConfigError("which recipe?", where="RECIPE", do=f"Shipped are: {', '.join(shipped())}.")
    fields = {"data_uri": data_uri, "model_name": model_name, "start_from": start_from, "target": target}
    form, checked = asked_for(recipe, overrides, here=False, **fields)
    if not target and TARGETS[checked.rollout.target].serves_here:
        form, checked = asked_for(recipe, overrides, here=False, **fields | {"target": "none"})
    if TARGETS[checked.rollout.target].serves_here:
        able = ", ".join(name for name, one in TARGETS.items() if not one.serves_here)
        raise ConfigError(
            "no pod can serve so", where="rollout.target", value=checked.rollout.target, do=f"Take one of {able}."
        )
    slices(checked)  # refuses what resolve would
    namespace = namespace_of(server, wanted.namespace)
    pipeline = checked.pipeline
    if version.own:
        chosen = upload(server, version, namespace, console, pipeline.name)
    else:
        chosen = _installed(server, pipeline.name, namespace)
    experiment = server.experiment(wanted.experiment, namespace)
    started = server.create_run(
        api.V2beta1Run(
            display_name=wanted.run_name or f"{checked.name} {datetime.now(UTC):%Y-%m-%d %H:%M:%S}",
            experiment_id=experiment.experiment_id,
            pipeline_version_reference=api.V2beta1PipelineVersionReference(
                pipeline_id=chosen.pipeline_id, pipeline_version_id=chosen.pipeline_version_id
            ),
            runtime_config=api.V2beta1RuntimeConfig(parameters=given(form, pipeline)),
            service_account=wanted.service_account,
        )
    )
    where = server.run_url(started.run_id)
    print_line(console, tell(f"run {started.display_name}: {where}"))
    return _wait(server, started, pipeline, console) if wait else int(Exit.DONE)


def namespace_of(server: Server, given: str | None, *, shared: bool = False) -> str | None:
    """The namespace to work in; None where the server knows no users, or for what may be `shared` by all of them.

    Raises:
        ConfigError: one is needed, or there are none.
    """
    several = server.multi_user()
    if several and not given and not shared:
        raise ConfigError("this server has a namespace for every user", where="--namespace", do="Name yours.")
    if given and not several:
        raise ConfigError("this server has no namespaces of users", where="--namespace", value=given, do="Leave it out")
    return given


def exit_code(run: V2beta1Run) -> Exit:
    """Of a run that has ended: that of the step that failed first where the server tells it, else a fault."""
    code = _ENDED.get(run.state or "", Exit.FAULT)
    if code is not Exit.FAULT:
        return code
    codes = [found for task in _failed(run) if (found := _code_in(_reason(task))) is not None]
    return codes[0] if codes else Exit.FAULT


def states(run: V2beta1Run, pipeline: Pipeline, now: datetime | None = None) -> list[StepState]:
    """Every step of the pipeline as the server tells it; of one that was tried again, the newest try."""
    tasks = sorted(_tasks(run), key=lambda task: task.create_time or datetime.min.replace(tzinfo=UTC))
    newest = {task.display_name: task for task in tasks}
    return [_state(name, newest.get(name), now or datetime.now(UTC)) for name in pipeline.rows]


def _wait(server: Server, started: V2beta1Run, pipeline: Pipeline, console: Console) -> int:
    """Show the steps until the run has ended; Ctrl-C asks what to do with it."""
    url = server.run_url(started.run_id)

    def say(line: str) -> None:
        print_line(console, tell(line))

    while True:
        try:
            run = _follow(server, started, pipeline, console, say)
            break
        except KeyboardInterrupt:
            answer = _asked()
        if answer == "c":
            server.terminate(started.run_id)
            say("cancelled; what is finished stays in the store, and the next run takes it from there")
            return int(Exit.PREEMPTED)
        if answer == "l":
            say(f"the run goes on: {url}")
            return int(Exit.PREEMPTED)
    reasons = [f": {task.display_name}: {_reason(task)}" for task in _failed(run)[:1]]
    say(f"{(run.state or 'unknown').lower()}{''.join(reasons)} ({url})")
    return int(exit_code(run))


def _follow(
    server: Server, started: V2beta1Run, pipeline: Pipeline, console: Console, say: Callable[[str], None]
) -> V2beta1Run:
    """The run once it has ended."""
    run = started
    with Watch(started.display_name or started.run_id, lambda: states(run, pipeline), console) as watch:
        while run.state not in _ENDED:
            _pause(POLL_SECONDS, watch.refresh)
            run = patiently(lambda: server.run(started.run_id), PATIENCE_SECONDS, say, POLL_SECONDS)
    return run


def _pause(seconds: float, refresh: Callable[[], None]) -> None:
    """Wait, keeping the seconds of running steps up to date."""
    until = time.monotonic() + seconds
    while (left := until - time.monotonic()) > 0:
        refresh()
        time.sleep(min(left, 0.5))


def _asked() -> str:
    """c, l or w: what to do with the run. Where nobody can be asked, or does not want to be, it is left alone."""
    if not sys.stdin.isatty():
        return "l"
    try:
        while True:
            answer = input("\nCancel the run (c), leave it running (l), or go on waiting (w)? ").strip().lower()
            # Whole words only: "continue" is no wish to cancel.
            if answer in ("c", "cancel", "l", "leave", "w", "wait"):
                return answer[0]
    except (KeyboardInterrupt, EOFError):
        return "l"


def _installed(server: Server, name: PipelineName, namespace: str | None) -> V2beta1PipelineVersion:
    """The newest version that is on the server, of the namespace's own pipeline or else of the shared one."""
    from nvila.pipelines.compile.package import resource_name

    pipeline = server.pipeline(called := resource_name(name), [namespace, None] if namespace else [None])
    newest = next(server.versions(pipeline.pipeline_id), None) if pipeline else None
    if newest is None:
        raise ConfigError(
            f"no pipeline {called} is installed there",
            where=server.host,
            do="Install the chart, or give --image to upload the pipeline from here.",
        )
    return newest


def _version(server: Server, pipeline_id: str, name: str) -> V2beta1PipelineVersion | None:
    return next((v for v in server.versions(pipeline_id) if name in (v.name, v.display_name)), None)


def _tasks(run: V2beta1Run) -> list[V2beta1PipelineTaskDetail]:
    return [task for task in (run.run_details and run.run_details.task_details) or [] if task.display_name in ROWS]


def _failed(run: V2beta1Run) -> list[V2beta1PipelineTaskDetail]:
    """Tasks that failed, first things first; a try that was followed by another does not count."""
    tasks = sorted(_tasks(run), key=lambda task: task.create_time or datetime.min.replace(tzinfo=UTC))
    newest = {task.display_name: task for task in tasks}
    failed = [task for task in newest.values() if task.state == "FAILED"]
    return sorted(failed, key=lambda task: task.end_time or datetime.max.replace(tzinfo=UTC))


def _reason(task: V2beta1PipelineTaskDetail) -> str:
    """What the server says about a failure, in one line."""
    errors = [task.error, *(status.error for status in reversed(task.state_history or []))]
    return next((plain(e.message) for e in errors if e and e.message), "the server gives no reason, its log does")


def _code_in(reason: str) -> Exit | None:
    """Kubernetes' `exit code 3`, where it is one of ours."""
    found = re.search(r"exit code:? (\d+)", reason)
    return Exit(int(found[1])) if found and int(found[1]) in list(Exit) else None


def _state(name: str, task: Any, now: datetime) -> StepState:
    if task is None:
        return StepState(name, "waiting", 0.0, "")
    status = _STATUS.get(task.state, (task.state or "waiting").lower())
    note = ""
    if status == "failed":
        note = _reason(task)
        status = {Exit.REJECTED: "rejected", Exit.PREEMPTED: "preempted"}.get(_code_in(note) or Exit.FAULT, "failed")
    return StepState(name, status, _seconds(task, now), note)


def _seconds(task: V2beta1PipelineTaskDetail, now: datetime) -> float:
    """From start to end, or to now. Times that are not known yet come as the year 1 or 1970."""
    start, end = task.start_time, task.end_time
    if start is None or start.year <= _NO_YEAR:
        return 0.0
    return max(((now if end is None or end.year <= _NO_YEAR else end) - start).total_seconds(), 0.0)
