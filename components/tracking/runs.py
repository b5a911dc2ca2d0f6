"""Writes each executed step to MLflow: a parent run per pipeline run, a child per step.

The runner calls `record_step` after the manifest is written; what the numbers mean is left to the steps.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nvila.components.contracts.environment import current
from nvila.components.contracts.files import read_json, write_atomic
from nvila.components.contracts.manifest import Manifest
from nvila.components.tracking.connect import connected, experiment_id, tracking_uri
from nvila.components.tracking.datasets import dataset_inputs
from nvila.components.tracking.flatten import batches, metrics, parameters
from nvila.components.tracking.redact import redact, redact_text

if TYPE_CHECKING:
    from mlflow import MlflowClient

PARENT_FILE = "mlflow.json"
CURVE_POINTS = 1000
"""Longer loss curves are thinned to this many points; the step's folder keeps all of them."""
_SHOWN = (".png", ".html")
_TAG_CHARS = 5000


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
) -> None:
    """Log one execution of a step as a finished child run.

    Args:
        run_dir: folder of the pipeline run; its parent is the runs folder.
        settings: the step's slice, logged as parameters with secrets redacted.
        manifest: the output; None when the step failed.
        began, ended: seconds since the epoch.
        error: the message of a failed step.
        measured: measurements of this execution.
    """
    with connected(run_dir.parent) as client:
        parent, experiment = _parent(client, run_dir)
        tags = {"mlflow.parentRunId": parent, "nvila.step": step, "nvila.run": run_dir.name}
        tags |= {f"nvila.input.{name}": ref.digest for name, ref in inputs.items()}
        if manifest:
            tags |= {"nvila.key": manifest.key, "nvila.digest": manifest.digest, "nvila.folder": manifest.folder}
        if error:
            tags["nvila.error"] = redact_text(error)[:_TAG_CHARS]
        run = client.create_run(experiment, start_time=_ms(began), run_name=step, tags=tags).info.run_id
        status = "FAILED"
        try:
            _log(client, run, settings, inputs, manifest, ended, measured)
            status = "FAILED" if manifest is None else "FINISHED"
        finally:
            client.set_terminated(run, status, _ms(ended))


def close_pipeline_run(run_dir: Path, status: str) -> None:
    """End the pipeline run's parent with `status` (FINISHED, FAILED or KILLED), its summary and its report.

    A parent that KFP opened is KFP's to close: nothing happens then.
    """
    if current().mlflow_run_id:
        return
    with connected(run_dir.parent) as client:
        parent, _ = _parent(client, run_dir)
        summary = run_dir / "summary.json"
        if summary.is_file():
            now, told = _ms(summary.stat().st_mtime), read_json(summary)
            for name in ("schema_version", "error"):
                told.pop(name, None)
            _log_metrics(client, parent, [(k, v, now, 0) for k, v in metrics(told).items()])
        for path in (summary, run_dir / "report.html"):
            if path.is_file():
                client.log_artifact(parent, str(path))
        client.set_terminated(parent, status)


def _parent(client: MlflowClient, run_dir: Path) -> tuple[str, str]:
    """Ids of the parent run and its experiment: KFP's run, this pipeline run's, or a new one."""
    from mlflow.exceptions import MlflowException

    if joined := current().mlflow_run_id:
        return joined, client.get_run(joined).info.experiment_id
    known = run_dir / PARENT_FILE
    if run_id := read_json(known).get("run_id"):
        try:
            info = client.get_run(str(run_id)).info
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":  # else the tracking store was replaced since
                raise
        else:
            if info.status != "RUNNING":
                client.update_run(info.run_id, status="RUNNING")
            return info.run_id, info.experiment_id
    experiment = experiment_id(client, run_dir.parent)
    run = client.create_run(experiment, run_name=run_dir.name, tags={"nvila.run": run_dir.name}).info.run_id
    record = {"tracking_uri": redact_text(tracking_uri(run_dir.parent)), "experiment_id": experiment, "run_id": run}
    write_atomic(known, json.dumps(record, indent=1))
    return run, experiment


def _log(
    client: MlflowClient,
    run: str,
    settings: Mapping[str, Any],
    inputs: Mapping[str, Manifest],
    manifest: Manifest | None,
    ended: float,
    measured: Mapping[str, float],
) -> None:
    from mlflow.entities import Param

    for some in batches(list(parameters(settings).items()), 100):
        client.log_batch(run, params=[Param(key, value) for key, value in some])
    if datasets := dataset_inputs(inputs, manifest):
        client.log_inputs(run, datasets)
    numbers = dict(measured)
    if manifest and manifest.result and manifest.kind != "slices":  # the slices are settings, which other steps log
        numbers = metrics(manifest.result) | numbers
    rows = [(key, value, _ms(ended), 0) for key, value in numbers.items()]
    _log_metrics(client, run, rows + (_curve(Path(manifest.folder), _ms(ended)) if manifest else []))
    if manifest:
        _log_files(client, run, manifest)


def _log_metrics(client: MlflowClient, run: str, rows: list[tuple[str, float, int, int]]) -> None:
    from mlflow.entities import Metric

    for some in batches(rows, 1000):
        client.log_batch(run, metrics=[Metric(key, float(value), time, step) for key, value, time, step in some])


def _curve(folder: Path, now: int) -> list[tuple[str, float, int, int]]:
    """Rows (name, value, ms, step) of `loss.jsonl`, where the step wrote one."""
    path = folder / "loss.jsonl"
    if not path.is_file():
        return []
    lines = list(_lines(path))
    every = max(1, -(-len(lines) // CURVE_POINTS))
    kept = lines[::every] + ([lines[-1]] if lines and (len(lines) - 1) % every else [])
    return [
        (f"curve/{key}", value, now, int(line["step"]))
        for line in kept
        for key, value in line.items()
        if key != "step" and isinstance(value, (int, float)) and not isinstance(value, bool)
    ]


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    """Records of a file of JSON lines; a line that a crash has cut off, or that is none of ours, is passed over."""
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
        try:
            content = json.loads(line)
        except ValueError:
            continue
        if isinstance(content, dict) and isinstance(content.get("step"), int):
            yield content


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
