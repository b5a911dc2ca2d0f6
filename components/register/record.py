"""The run behind a version: its metrics, tied to the logged model and to the data they were measured on."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import TYPE_CHECKING

from nvila.components.contracts.manifest import Manifest
from nvila.components.contracts.results.accuracy import Evaluation, QuantizedEvaluation
from nvila.components.contracts.steps import REGISTER
from nvila.components.tracking.datasets import dataset_inputs
from nvila.components.tracking.flatten import batches, metrics

if TYPE_CHECKING:
    from mlflow import MlflowClient


def record_metrics(
    client: MlflowClient, experiment: str, name: str, model_id: str, inputs: Mapping[str, Manifest]
) -> str:
    """Log the accuracy before and after quantization against the logged model; return the run's id.

    Metrics whose dataset and model are named are what MLflow shows as a model's lineage.
    """
    from mlflow.entities import LoggedModelOutput, Metric

    run = client.create_run(experiment, run_name=f"{REGISTER} {name}", tags={"nvila.step": REGISTER}).info.run_id
    datasets = dataset_inputs({"samples": inputs["samples"]}, None)
    if datasets:
        client.log_inputs(run, datasets)
    client.log_outputs(run, [LoggedModelOutput(model_id, step=0)])
    data = {"dataset_name": datasets[0].dataset.name, "dataset_digest": datasets[0].dataset.digest} if datasets else {}
    now = int(time.time() * 1000)
    told = {"full": inputs["full"].told(Evaluation), "quantized": inputs["metrics"].told(QuantizedEvaluation)}
    values = metrics({name: result.model_dump()["accuracy"] for name, result in told.items()})
    rows = [Metric(key, value, now, 0, model_id=model_id, **data) for key, value in values.items()]
    for some in batches(rows, 1000):
        client.log_batch(run, metrics=some)
    client.set_terminated(run)
    return run
