"""What the run behind a version says of it: metrics, tied to the logged model and to the data they were measured on."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import TYPE_CHECKING

from nvila.components.contracts.manifest import Manifest
from nvila.components.contracts.results.accuracy import Evaluation, QuantizedEvaluation
from nvila.components.tracking.datasets import dataset_inputs
from nvila.components.tracking.flatten import batches, metrics

if TYPE_CHECKING:
    from mlflow import MlflowClient


def record_metrics(client: MlflowClient, run: str, model_id: str, inputs: Mapping[str, Manifest]) -> None:
    """Log the accuracy before and after quantization against the logged model, by the names that it has in the runs of
    the steps that measured it.

    Metrics whose dataset and model are named are what MLflow shows as a model's lineage.
    """
    from mlflow.entities import LoggedModelOutput, Metric

    datasets = dataset_inputs({"samples": inputs["samples"]}, None)
    if datasets:
        client.log_inputs(run, datasets)
    client.log_outputs(run, [LoggedModelOutput(model_id, step=0)])
    data = {"dataset_name": datasets[0].dataset.name, "dataset_digest": datasets[0].dataset.digest} if datasets else {}
    now = int(time.time() * 1000)
    told = {
        m.step: m.told(kind) for m, kind in ((inputs["full"], Evaluation), (inputs["metrics"], QuantizedEvaluation))
    }
    values = metrics({step: result.model_dump(include={"accuracy"}) for step, result in told.items()})
    rows = [Metric(key, value, now, 0, model_id=model_id, **data) for key, value in values.items()]
    for some in batches(rows, 1000):
        client.log_batch(run, metrics=some)
