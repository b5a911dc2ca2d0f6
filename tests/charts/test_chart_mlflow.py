"""The MLflow server's pod: what an upgrade makes anew, and what it leaves alone."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from helming import CHART, find, render

from nvila.infra.images.build import mlflow_version


def test_an_upgrade_of_the_platform_leaves_the_server_alone(tmp_path: Path) -> None:
    """It ran in the steps' image, so every upgrade ended it, and the runs that were recording waited."""
    newer = Path(shutil.copytree(CHART, tmp_path / CHART.name))
    about = newer / "Chart.yaml"
    about.write_text(about.read_text().replace("ersion: 0.1.0", "ersion: 0.2.0"))
    others = ("base", "quantize", "train", "controller", "serve")
    assert _pod(chart=newer, sets=[f'images.{name}="r/{name}:0.2.0"' for name in others]) == _pod()


def test_what_concerns_the_server_reaches_it() -> None:
    """A new image or host that waits for somebody to delete the pod is no upgrade."""
    for change in ('images.mlflow="r/mlflow:4"', 'mlflow.allowedHosts=["m.example"]', "mlflow.auth.enabled=true"):
        assert _pod(sets=[change]) != _pod()


def test_the_image_is_named_by_the_version_of_the_lock() -> None:
    """Under the old name a new MLflow is not fetched by a node that has the old one."""
    assert _pod()["spec"]["containers"][0]["image"].rpartition(":")[2] == mlflow_version()


def _pod(**how: Any) -> Any:
    return find(render(**how), "Deployment", "nvila-mlflow")["spec"]["template"]
