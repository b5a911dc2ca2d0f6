"""Writes each executed step to MLflow: a parent run per pipeline run, a child per step.

The runner calls `record_step` after the manifest is written; what the numbers mean is left to the steps. What cannot be
written because MLflow is away waits in the run's folder, and is written with what comes next.
"""

from __future__ import annotations

import getpass
import json
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from nvila.components.contracts import jsonlines
from nvila.components.contracts.environment import current
from nvila.components.contracts.errors import NvilaError, Unreachable
from nvila.components.contracts.files import discard, read_json, write_atomic
from nvila.components.contracts.manifest import MANIFEST, Manifest
from nvila.components.contracts.meter import METER, rates, read_meter
from nvila.components.contracts.processes import OWNER
from nvila.components.contracts.text import say
from nvila.components.tracking.columns import RUN_NAME, TAG, VALUE, fitted, key
from nvila.components.tracking.connect import connected, experiment_id, pages, tracking_uri
from nvila.components.tracking.datasets import dataset_inputs
from nvila.components.tracking.flatten import batches, metrics, parameters
from nvila.components.tracking.redact import redact, redact_text

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

T = TypeVar("T")
PARENT_FILE = "mlflow.json"
PROCESS_TAG = "nvila.process"
"""Which process runs the pipeline run: where it has ended, nobody else will end the run here."""
UNTRACKED = "untracked"
"""Folder of records that MLflow has not taken yet."""
CURVE_POINTS = 1000
"""Longer loss curves are thinned to this many points; the step's folder keeps all of them."""
LIVE_POINTS = 30
"""The same of each look at a stage that is being trained."""
_SHOWN = (".png", ".html", ".md")


@dataclass(frozen=True)
class _Record:
    """One execution of a step."""

    step: str
    settings: Mapping[str, Any]
    inputs: Mapping[str, Manifest]
    manifest: Manifest | None
    began: float
    ended: float
    error: str | None
    measured: Mapping[str, float]
    told: int = -1
    """The last optimizer step whose place in the curves is there already."""


def record_step(
    run_dir: Path,
    step: str,
    settings: Mapping[str, Any],
    inputs: Mapping[str, Manifest],
    manifest: Manifest | None,
    began: float,
    ended: float,
    error: str | None,
    measured: Mapping[str, float],
    recipe: Mapping[str, Any] | None = None,
    told: int = -1,
) -> None:
    """Log one execution of a step as a finished child run.

    Args:
        run_dir: folder of the pipeline run; its parent is the runs folder.
        settings: the step's slice, logged as parameters with secrets redacted.
        manifest: the output; None when the step failed.
        began, ended: seconds since the epoch.
        error: the message of a failed step.
        measured: measurements of this execution.
        recipe: what the pipeline run is of, if that is known: the parent's parameters.
        told: the last optimizer step that `add_curve` has told of.

    Raises:
        Unreachable: MLflow does not answer; the record is kept, and written with the next that it takes.
    """
    record = _Record(step, settings, inputs, manifest, began, ended, error, measured, told)
    try:
        with connected(run_dir.parent, 0 if any(_kept(run_dir)) else None) as client:
            parent = _parent(client, run_dir, recipe)
            _make_up(client, run_dir, parent)
            _write(client, run_dir, parent, record)
    except Unreachable:
        _keep(run_dir, record)
        raise


def open_step(client: MlflowClient, run_dir: Path, step: str) -> Run:
    """The child of a step that refers to it before it has ended; `record_step` completes it."""
    return _child(client, run_dir, _parent(client, run_dir), step, time.time())


def add_curve(run_dir: Path, step: str, folder: Path, began: float, told: int) -> int:
    """Tell of the optimizer steps behind `told` in the open child of a step; the last that is told of by now.

    Raises:
        Unreachable: MLflow does not answer.
    """
    rows = _curve(folder, _ms(time.time()), told, LIVE_POINTS, ended=False)
    if rows:
        with connected(run_dir.parent, 0) as client:
            run = _child(client, run_dir, _parent(client, run_dir), step, began)
            named = [(f"{step}/{name}", value, at, number) for name, value, at, number in rows]
            _log_metrics(client, run.info.run_id, named)
    return max((number for *_, number in rows), default=told)


def is_tracked(run_dir: Path) -> bool:
    """Whether there is a parent run that `close_pipeline_run` has to end."""
    return not current().mlflow_run_id and ((run_dir / PARENT_FILE).is_file() or any(_kept(run_dir)))


def close_pipeline_run(run_dir: Path, status: str) -> None:
    """End the pipeline run's parent with `status` (FINISHED, FAILED or KILLED), its summary and its report.

    A parent that KFP opened is KFP's to close: nothing happens then.
    """
    if current().mlflow_run_id:
        return
    with connected(run_dir.parent) as client:
        run = _parent(client, run_dir)
        _make_up(client, run_dir, run)
        parent, summary = run.info.run_id, run_dir / "summary.json"
        if summary.is_file():
            now, told = _ms(summary.stat().st_mtime), read_json(summary)
            for name in ("schema_version", "error"):
                told.pop(name, None)
            _log_metrics(client, parent, [(k, v, now, 0) for k, v in metrics(told).items()])
        for path in (summary, run_dir / "report.html"):
            if path.is_file():
                client.log_artifact(parent, str(path))
        client.set_terminated(parent, status)


def folder_of(runs: Path, run: Run) -> Path | None:
    """The folder below `runs` whose pipeline run this is, or is a step of."""
    name = run.data.tags.get("nvila.run", "")
    if not name or Path(name).name != name:
        return None
    parent = read_json(runs / name / PARENT_FILE).get("run_id")
    return runs / name if parent and parent in (run.info.run_id, run.data.tags.get("mlflow.parentRunId")) else None


def registered_here(runs: Path, run_ids: Iterable[str]) -> set[str]:
    """Those of the ids that are runs of this folder."""
    with connected(runs) as client:
        found = {run_id: _run(client, run_id) for run_id in run_ids if run_id}
    return {run_id for run_id, run in found.items() if run and folder_of(runs, run)}


def _parent(client: MlflowClient, run_dir: Path, recipe: Mapping[str, Any] | None = None) -> Run:
    """The parent run: KFP's, this pipeline run's, or a new one; with the recipe's parameters, where that is known."""
    joined = current().mlflow_run_id
    run = client.get_run(joined) if joined else _own_parent(client, run_dir)
    if recipe:
        _log_parameters(client, run.info.run_id, recipe, "recipe.json", run.data.params)
    return run


def _own_parent(client: MlflowClient, run_dir: Path) -> Run:
    experiment = experiment_id(client, run_dir.parent)
    known = run_dir / PARENT_FILE
    run = _run(client, str(read_json(known).get("run_id", "")))
    if run and run.info.lifecycle_stage == "active":
        if run.info.status != "RUNNING":
            client.update_run(run.info.run_id, status="RUNNING")
        return run
    # The first record of this run; or the tracking store was replaced since, or somebody has deleted the parent.
    tags = _origin("run") | _run_tags(run_dir)
    run = client.create_run(experiment, run_name=fitted(run_dir.name, RUN_NAME), tags=tags)
    record = {
        "tracking_uri": redact_text(tracking_uri(run_dir.parent)),
        "experiment_id": experiment,
        "run_id": run.info.run_id,
    }
    write_atomic(known, json.dumps(record, indent=1))
    return run


def _run(client: MlflowClient, run_id: str) -> Run | None:
    from mlflow.exceptions import MlflowException

    try:
        return client.get_run(run_id) if run_id else None
    except MlflowException as error:
        if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            raise
        return None


def _child(client: MlflowClient, run_dir: Path, parent: Run, step: str, began: float) -> Run:
    """The open run of this step, or a new one."""
    known = {"mlflow.parentRunId": parent.info.run_id, "nvila.step": step}
    query = " and ".join([f"tags.`{name}` = '{value}'" for name, value in known.items()])
    for run in pages(client.search_runs, [parent.info.experiment_id], f"{query} and attributes.status = 'RUNNING'"):
        return run  # type: ignore[no-any-return]
    tags = _origin(step) | known | _run_tags(run_dir)
    return client.create_run(parent.info.experiment_id, start_time=_ms(began), run_name=step, tags=tags)


def _run_tags(run_dir: Path) -> dict[str, str]:
    """Which pipeline run, and where it is one of `nvila run`, of which process."""
    owner = read_json(run_dir / OWNER)
    owner.pop("command", None)
    return {"nvila.run": run_dir.name} | ({PROCESS_TAG: json.dumps(owner)} if owner else {})


def _origin(what: str) -> dict[str, str]:
    """The columns `User` and `Source` of the UI."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a container's number without a name
        user = "unknown"
    kind = "JOB" if current().on_cluster else "LOCAL"
    return {"mlflow.user": user, "mlflow.source.type": kind, "mlflow.source.name": f"nvila {what}"}


def _write(client: MlflowClient, run_dir: Path, parent: Run, record: _Record) -> None:
    run, status = _child(client, run_dir, parent, record.step, record.began).info.run_id, "FAILED"
    try:
        _log(client, run, record)
        status = "FAILED" if record.manifest is None else "FINISHED"
    finally:
        client.set_terminated(run, status, _ms(record.ended))


def _kept(run_dir: Path) -> Iterator[Path]:
    return (run_dir / UNTRACKED).glob("*.json")


def _keep(run_dir: Path, record: _Record) -> None:
    """Leave a record for `_make_up`; manifests by their place in the store."""
    content = {
        "step": record.step,
        "settings": redact(record.settings),
        "inputs": {name: f"{made.folder}/{MANIFEST}" for name, made in record.inputs.items()},
        "manifest": f"{record.manifest.folder}/{MANIFEST}" if record.manifest else None,
        "began": record.began,
        "ended": record.ended,
        "error": redact_text(record.error) if record.error else None,
        "measured": dict(record.measured),
        "told": record.told,
    }
    write_atomic(run_dir / UNTRACKED / f"{record.began:.3f}-{record.step}.json", json.dumps(content, default=str))


def _make_up(client: MlflowClient, run_dir: Path, parent: Run) -> None:
    """Write what MLflow was away for; of work that is not in the store any more, that is said."""
    for path in sorted(_kept(run_dir)):
        content = read_json(path)
        try:
            content["inputs"] = {name: Manifest.load(place) for name, place in content["inputs"].items()}
            content["manifest"] = Manifest.load(content["manifest"]) if content["manifest"] else None
            record = _Record(**content)
        except (NvilaError, KeyError, TypeError) as error:
            say(redact_text(f"{path.name} is not tracked in MLflow: {error}"))
        else:
            _write(client, run_dir, parent, record)
        discard(path)


def _log(client: MlflowClient, run: str, record: _Record) -> None:
    from mlflow.entities import RunTag

    manifest = record.manifest
    tags = {f"nvila.input.{name}": made.digest for name, made in record.inputs.items()}
    if manifest:
        tags |= {"nvila.key": manifest.key, "nvila.digest": manifest.digest, "nvila.folder": manifest.folder}
    if record.error:
        tags["nvila.error"] = redact_text(record.error)
    for some in batches(list(tags.items()), 100):
        client.log_batch(run, tags=[RunTag(name, fitted(text, TAG)) for name, text in some])
    _log_parameters(client, run, record.settings, "settings.json")
    if datasets := dataset_inputs(record.inputs, manifest):
        client.log_inputs(run, datasets)
    numbers = dict(record.measured)
    if manifest and manifest.result and manifest.kind != "slices":  # the slices are settings, which other steps log
        numbers = metrics(manifest.result) | numbers
    now = _ms(record.ended)
    rows = [(name, value, now, 0) for name, value in numbers.items()]
    rows += _curve(Path(manifest.folder), now, record.told, CURVE_POINTS, ended=True) if manifest else []
    _log_metrics(client, run, [(f"{record.step}/{name}", value, at, step) for name, value, at, step in rows])
    if manifest:
        _log_files(client, run, manifest)


def _log_parameters(
    client: MlflowClient, run: str, settings: Mapping[str, Any], whole: str, known: Mapping[str, str] | None = None
) -> None:
    """The settings that the run does not have yet; as a file as well, named `whole`, where one is cut."""
    from mlflow.entities import Param

    new = {name: value for name, value in parameters(settings).items() if name not in (known or {})}
    for some in batches(list(new.items()), 100):
        client.log_batch(run, params=[Param(name, value) for name, value in some])
    if any(len(value) == VALUE for value in new.values()):
        client.log_text(run, json.dumps(redact(settings), indent=1, default=str), whole)


def _log_metrics(client: MlflowClient, run: str, rows: list[tuple[str, float, int, int]]) -> None:
    from mlflow.entities import Metric

    for some in batches(rows, 1000):
        client.log_batch(run, metrics=[Metric(key(name), float(value), at, step) for name, value, at, step in some])


def _curve(folder: Path, now: int, told: int, most: int, *, ended: bool) -> list[tuple[str, float, int, int]]:
    """Rows (name, value, ms, step) of `loss.jsonl` and of the rates of `meter.jsonl`, where the step wrote them, of the
    optimizer steps behind `told`: to the last, or, while there will be more, to the last that was measured."""
    losses = [line for line in jsonlines.whole(folder / "loss.jsonl") if _behind(line.get("step"), told)]
    readings = [(attempt, reading) for attempt, reading in read_meter(folder / METER) if reading.step > told]
    measured = [(reading, rates([(attempt, reading)]).model_dump()) for attempt, reading in readings]
    if not ended:
        measured_to = max((reading.step for _, reading in readings), default=told)
        losses = [line for line in losses if line["step"] <= measured_to]
    found = [(now, int(line["step"]), line) for line in _thinned(losses, most)]
    found += [(_ms(reading.time), reading.step, told) for reading, told in _thinned(measured, most)]
    return [
        (f"curve/{name}", value, at, step)
        for at, step, told in found
        for name, value in told.items()
        if name != "step" and isinstance(value, (int, float)) and not isinstance(value, bool)
    ]


def _behind(step: Any, told: int) -> bool:
    return isinstance(step, int) and step > told


def _thinned(lines: list[T], most: int) -> list[T]:
    every = max(1, -(-len(lines) // most))
    return lines[::every] + ([lines[-1]] if lines and (len(lines) - 1) % every else [])


def _log_files(client: MlflowClient, run: str, manifest: Manifest) -> None:
    folder = Path(manifest.folder)
    shown = redact(json.loads((folder / "manifest.json").read_text(encoding="utf-8")))  # its values may be settings
    client.log_text(run, json.dumps(shown, indent=1), "manifest.json")
    for name in manifest.files:
        path = folder / name
        if path.suffix in _SHOWN and path.is_file():
            client.log_artifact(run, str(path), Path(name).parent.as_posix().removeprefix(".") or None)


def _ms(seconds: float) -> int:
    return int(seconds * 1000)
