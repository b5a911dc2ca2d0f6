"""Runs one step under the contracts. Every KFP wrapper calls `execute` and nothing else."""

from __future__ import annotations

import importlib
import math
import os
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import MappingProxyType
from typing import Any, NoReturn

from nvila.components.contracts.environment import Environment, entered, handed_down, name_of, notices
from nvila.components.contracts.errors import (
    ConfigError,
    DamagedError,
    NvilaError,
    Preempted,
    Unreachable,
    from_record,
    to_record,
)
from nvila.components.contracts.exits import Exit
from nvila.components.contracts.files import discard
from nvila.components.contracts.keys import content_key
from nvila.components.contracts.manifest import (
    MANIFEST,
    START,
    SUSPECT,
    InputRef,
    Manifest,
    describe_files,
)
from nvila.components.contracts.progress import progress_file
from nvila.components.contracts.results.run import Resolution
from nvila.components.contracts.step import call
from nvila.components.contracts.steps import RESOLVE, ROWS, STAGES, STEPS
from nvila.components.contracts.store import TOMBSTONE, Store
from nvila.components.contracts.text import say
from nvila.components.runner.code import code_digest
from nvila.components.runner.handover import FOLDER
from nvila.components.runner.status import Status, StepStatus
from nvila.components.runner.work import Work, do
from nvila.components.tracking.flatten import metrics
from nvila.components.tracking.live import Live
from nvila.components.tracking.redact import redact, redact_text, tell

COMPARED = frozenset(row.name for row in STEPS if row.compared)
_INTERVAL = frozenset({"low", "high"})
ALWAYS = frozenset(row.name for row in STEPS if row.always)


@dataclass(frozen=True)
class Place:
    """Where a step finds the store and the pipeline run it belongs to."""

    store: Store
    run_dir: Path

    @property
    def run(self) -> str:
        """Name of the pipeline run."""
        return self.run_dir.name

    @classmethod
    def of(cls, here: Environment) -> Place:
        """Of a process with this environment."""
        return cls(Store((here.store or Path("store")).absolute()), here.run_folder)


def execute(
    step: str,
    module: str,
    slices: str | None,
    inputs: Mapping[str, str],
    output: str,
    settings: Any = None,
    shown: Mapping[str, str] = MappingProxyType({}),
    at_end: Callable[[Environment], None] = lambda here: None,
) -> dict[str, Any]:
    """Run a step or skip it, write its manifest to `output`, and return metadata for the KFP artifact.

    Where the recipe leaves the step out, one of its inputs goes on in its place.

    Leaves the process with the step's exit code when it fails (see `Exit`), after writing the status file.

    Args:
        step: name in the DAG, such as `train-4`; selects the slice.
        module: dotted name of the step module.
        slices: path of the manifest that `resolve` wrote; None where `settings` is given.
        inputs: paths of the input manifests by name.
        output: where KFP wants the artifact's file.
        settings: the slice itself, for `resolve`, which makes the slices.
        shown: pages of the step's folder that KFP's UI renders, and where it wants each.
        at_end: called last, however the step has ended.
    """
    try:
        here = Environment.read()
    except NvilaError as error:
        _leave(error.exit_code, f"{step}: {error}")
    with entered(here):
        place = Place.of(here)
        status = _Status(here, step)
        signal.signal(signal.SIGTERM, _preempted)
        try:
            for line in notices() if here.on_cluster else ():
                say(line)
            status.begin()
            _refuse_other_code(here.code)
            if slices is not None:
                every = Manifest.load(slices).told(Resolution).slices
                if step not in every:
                    raise ConfigError(f"the recipe has no slice for step {step}", where=slices, value=sorted(every))
                settings = every[step]
            loaded = {name: place.store.load(path) for name, path in inputs.items()}
            made, cached = perform(here, step, module, settings, loaded) if settings is not None else (None, False)
            manifest = made or loaded[ROWS[step].hands_on]
            manifest.save(Path(output))
            for page, place_of_page in shown.items():
                shutil.copyfile(Path(manifest.folder, page), place_of_page)
            how = Status.CACHED if cached else Status.DONE if made else Status.NOT_ASKED_FOR
            status.end(how, Exit.DONE, manifest=str(Path(made.folder, MANIFEST)) if made else None)
            facts = {"uri": manifest.folder, "digest": manifest.digest, "step": step, "cached": cached}
            return facts | _scalars(manifest)
        except NvilaError as error:
            status.fail(error, _verdict(error.exit_code), error.exit_code)
            _leave(error.exit_code, f"{step}: {error}")
        except KeyboardInterrupt:
            status.fail(Preempted("interrupted"), Status.PREEMPTED, Exit.PREEMPTED)
            _leave(Exit.PREEMPTED, f"{step}: interrupted; the same command resumes it")
        except Exception as error:
            print(tell(traceback.format_exc()), file=sys.stderr, flush=True)
            status.fail(error, Status.FAILED, Exit.FAULT)
            _leave(Exit.FAULT, f"{step}: {type(error).__name__}: {error}")
        finally:
            at_end(here)


def perform(
    here: Environment,
    step: str,
    module: str,
    settings: Mapping[str, Any],
    inputs: Mapping[str, Manifest],
    tracked: bool = True,
) -> tuple[Manifest, bool]:
    """The manifest of this work, and whether it was there already; MLflow is told of it where it is `tracked`.

    Raises:
        NvilaError: what the step raised; exit codes 2 and 3 leave a tombstone for retries within the same run.
    """
    code, place = importlib.import_module(module), Place.of(here)
    if hasattr(code, "prepare"):
        with handed_down(progress_file=progress_file(place.run_dir, step)):
            code.prepare(code.Settings.model_validate(settings))
    key, external = identity(here, step, module, settings, inputs)
    digests = {name: manifest.digest for name, manifest in inputs.items()}
    store = place.store
    with store.working(step, key) as folder:
        if step not in ALWAYS:
            store.mend(step, key)
            if finished := store.finished(step, key, digests):
                return finished, True
            if verdict := store.buried(step, key, place.run):
                raise verdict
            if os.path.lexists(folder / MANIFEST) or os.path.lexists(folder / SUSPECT):
                # Finished once, damaged since: nothing in the folder can be trusted, so nothing of it is resumed.
                store.remove(step, key)
                folder.mkdir(exist_ok=True)
        for name in (MANIFEST, TOMBSTONE, SUSPECT):
            discard(folder / name)
        began, clock = time.time(), time.monotonic()
        curves = Live(place.run_dir, step, folder, began)
        try:
            if step in COMPARED and inputs:
                from nvila.components.tracking.recorded import compare

                compare(place.run_dir.parent, step, inputs)
            with (
                handed_down(progress_file=progress_file(place.run_dir, step)),
                curves if tracked and step in STAGES else nullcontext(),
            ):
                outcome = do(Work(step, module, key, settings, inputs, folder, place.run_dir, here))
            if outcome.read is not None and outcome.read != external:
                store.remove(step, key)  # it holds work on what the key does not say
                raise Unreachable(
                    "what the step reads was replaced while it worked",
                    value=sorted(name for name in outcome.read if outcome.read[name] != (external or {}).get(name)),
                    do="Run the same command again; it takes what is there now.",
                )
        except Exception as error:
            if isinstance(error, NvilaError) and error.exit_code in (Exit.USER, Exit.REJECTED):
                store.bury(step, key, place.run, error)
            if tracked:
                why = str(error) or type(error).__name__
                _track(place, step, settings, inputs, None, began, why, {}, curves.told)
            raise
        files = describe_files(folder, outcome.files)
        for name in [name for name in files if name in (MANIFEST, TOMBSTONE, SUSPECT) or name.startswith(f"{FOLDER}/")]:
            del files[name]
        manifest = Manifest(
            step=step,
            key=key,
            kind=outcome.kind,
            inputs={
                n: InputRef(step=m.step, uri=str(store.folder(m.step, m.key) / MANIFEST), digest=digests[n])
                for n, m in inputs.items()
            }
            | ({START: outcome.start} if outcome.start else {}),
            sources=outcome.sources,
            files=files,
            result=outcome.result,
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            seconds=round(time.monotonic() - clock, 3),
            machine=dict(outcome.machine),
        )
        manifest = store.finish(folder, manifest)
    if tracked:
        _track(place, step, settings, inputs, manifest, began, None, outcome.measured, curves.told)
    return manifest, False


def identity(
    here: Environment, step: str, module: str, settings: Mapping[str, Any], inputs: Mapping[str, Manifest]
) -> tuple[str, dict[str, Any] | None]:
    """The content key of this work, and what the step reads outside the store (see `contracts.step`)."""
    code = importlib.import_module(module)
    external = call(code.external, settings, here=here) if hasattr(code, "external") else None
    digests = {name: manifest.digest for name, manifest in inputs.items()}
    # What acts on the world acts for its run: two at once would write into one folder, and read each other's.
    whose = {"run": Place.of(here).run} if step in ALWAYS else {}
    keyed = code.keyed(settings) if hasattr(code, "keyed") else settings
    return content_key(module, {"step": step, **whose, **keyed}, digests, external), external


def _track(
    place: Place,
    step: str,
    settings: Mapping[str, Any],
    inputs: Mapping[str, Manifest],
    manifest: Manifest | None,
    began: float,
    error: str | None,
    measured: Mapping[str, float],
    told: int,
) -> None:
    """Tell MLflow. A tracking store that is down must not lose finished work: the manifest is written already."""
    from nvila.components.tracking.runs import record_step

    try:
        ended, recipe = time.time(), _recipe(place.run_dir, manifest)
        record_step(place.run_dir, step, settings, inputs, manifest, began, ended, error, measured, recipe, told)
    except Unreachable as away:
        say(redact_text(f"{step}: not tracked yet, as {away.what}; that is made up for when it is back"))
    except Exception as problem:
        why = tell(f"{type(problem).__name__}: {problem}")
        print(f"{step}: not tracked in MLflow: {why}", file=sys.stderr, flush=True)


def _recipe(run_dir: Path, manifest: Manifest | None) -> dict[str, Any] | None:
    """What the run is of; None where `resolve` has not come through."""
    if manifest is None or manifest.step != RESOLVE:
        resolved = StepStatus.read(run_dir, RESOLVE).manifest
        if resolved is None:
            return None
        manifest = Manifest.load(resolved)
    return manifest.told(Resolution).recipe


class _Status:
    """Says in the run's folder how far this step is (see `StepStatus`)."""

    def __init__(self, here: Environment, step: str) -> None:
        self._run_dir, self._on_cluster = here.run_folder, here.on_cluster
        whose, now = here.pipeline or "lifecycle", time.time()
        self._record = StepStatus(name=step, pipeline=whose, status=Status.RUNNING, started=now, pid=os.getpid())

    def begin(self) -> None:
        """Say that the step is running.

        Raises:
            NvilaError: on a cluster an earlier pod of this run has ended with exit code 2 or 3. That stays, though KFP
                starts another; unlike a tombstone it needs no content key, which some errors come before. Where nobody
                but a person starts a step again, the step looks again.
        """
        before = StepStatus.read(self._run_dir, self._record.name)
        if self._on_cluster and before.exit_code in (Exit.USER, Exit.REJECTED):
            raise from_record(before.error) if before.error else NvilaError(str(before.message))
        self._record.write(self._run_dir)

    def fail(self, error: Exception, status: Status, code: Exit) -> None:
        """Say why the step ended without."""
        ours = isinstance(error, NvilaError)
        message = redact_text(str(error) if ours else f"{type(error).__name__}: {error}")
        damaged = isinstance(error, DamagedError)
        self.end(status, code, message=message, error=redact(to_record(error)), damaged=damaged)

    def end(self, status: Status, code: Exit, **said: Any) -> None:
        """Say how the step ended."""
        ended = {"status": status, "exit_code": code, "ended": time.time()}
        self._record = self._record.model_copy(update=ended | said)
        self._record.write(self._run_dir)


def _refuse_other_code(wanted: str | None) -> None:
    """A pipeline says from which code it was compiled; its graph and other code would not fit together."""
    if wanted and wanted != (found := code_digest()):
        raise ConfigError(
            "the image holds other code than the pipeline was compiled from",
            where=name_of("code"),
            value=found,
            do=f"Compile with the image of {wanted}, or submit from the commit that the image was built from.",
        )


def _scalars(manifest: Manifest) -> dict[str, float]:
    """Numbers for the table of scalar metrics in the UI; intervals, and what lies deep, are left to the report."""
    if manifest.kind != "metrics":
        return {}
    found = metrics(manifest.result).items() if manifest.result else ()
    return {n: v for n, v in found if n.count("/") < 4 and n.rpartition("/")[2] not in _INTERVAL and math.isfinite(v)}


def _verdict(code: Exit) -> Status:
    return {Exit.REJECTED: Status.REJECTED, Exit.PREEMPTED: Status.PREEMPTED}.get(code, Status.FAILED)


def _preempted(signum: int, frame: object) -> NoReturn:
    raise Preempted("asked to stop by SIGTERM", do="Run the same command again to resume.")


def _leave(code: Exit, message: str) -> NoReturn:
    print(tell(message), file=sys.stderr, flush=True)
    sys.stdout.flush()
    raise SystemExit(int(code))
