"""A training job whose pod is real: the step's node program in an image, its log, and the rights that the chart gives.

The test stands in for Kubeflow Trainer, which the test cluster lacks: it makes the pod that the job asks for. Needs a
node on this machine that has the image `NVILA_NODE_IMAGE`, of this very code.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from kube import default_account, service_account, wait_for, write_kubeconfig
from launches import Launch

from nvila.components.kube.cluster import Cluster
from nvila.components.kube.requests import Requests
from nvila.infra.launch.jobs import JOBSET_LABEL, TRAIN_JOB

sys.path.append(str(Path(__file__).parents[1] / "charts"))
from helming import find, render

LINES = 40


def test_the_charts_role_is_all_a_launcher_needs(
    launch: Launch, cluster: Cluster, admin: Requests, kubeconfig: Path, set_status: Callable[..., None]
) -> None:
    """A right too few stops every run of every user; without that to logs, the log is missing without a word."""
    image = os.environ.get("NVILA_NODE_IMAGE") or pytest.skip("NVILA_NODE_IMAGE is not set")
    namespace = launch.jobs.namespace
    rules = find(render(), "Role", "nvila-launcher")["rules"]
    token = service_account(admin, namespace, "pipeline-runner", rules)
    mine = write_kubeconfig(kubeconfig, launch.folder / "runner", namespace, token)
    launch.record |= {"step": "prune-video", "module": "nvila.components.prune.step", "settings": NOTHING_TO_PRUNE}
    process = launch.start(KUBECONFIG=str(mine))
    job = cluster.get(TRAIN_JOB, launch.attached().name) or {}
    default_account(admin, namespace)
    pods = f"/api/v1/namespaces/{namespace}/pods"
    admin.ask("POST", pods, body=_pod_of(job, launch, image))
    code = wait_for(lambda: _exit_code(admin, f"{pods}/first"), "the pod does not end", seconds=120)
    set_status(launch.name, "Complete" if code == "0" else "Failed")
    ended = launch.ends(process)
    if "other code" in launch.said():
        pytest.skip(f"{image} is of another commit: make images")
    assert (code, ended) == ("0", 0), launch.said()
    said = launch.said().splitlines()
    assert [line for line in said if line.startswith("line ")] == [f"line {n}" for n in range(1, LINES + 1)]
    assert said[-1].startswith('made {"sources": {}')
    assert list(launch.work.out.glob("scores.parquet"))


NOTHING_TO_PRUNE: dict[str, Any] = {"prune": {}, "sources": [], "seed": 0, "max_skipped_share": 0.01}
"""The quickest work of a heavy step."""


def _pod_of(job: dict[str, Any], launch: Launch, image: str) -> dict[str, Any]:
    """The pod of the first node, as Trainer and JobSet would make it; the test's folder is the shared volume."""
    trainer = job["spec"]["trainer"]
    slowly = f'for n in $(seq {LINES}); do echo line $n; sleep 0.1; done; exec "$@"'
    folder = str(launch.folder)
    container = {
        "name": "node",
        "image": image,
        "imagePullPolicy": "Never",
        "command": ["sh", "-c", slowly, "sh", *trainer["command"]],
        "env": [*trainer["env"], {"name": "PET_NODE_RANK", "value": "0"}],
        "volumeMounts": [{"name": "nvila", "mountPath": folder}, {"name": "tmp", "mountPath": "/tmp"}],
        "securityContext": {"runAsUser": 0},  # the folder is the test's own
    }
    labels = {JOBSET_LABEL: launch.name, "batch.kubernetes.io/job-completion-index": "0"}
    volumes = [{"name": "nvila", "hostPath": {"path": folder}}, {"name": "tmp", "emptyDir": {}}]
    spec = {"restartPolicy": "Never", "containers": [container], "volumes": volumes}
    return {"metadata": {"name": "first", "labels": labels}, "spec": spec}


def _exit_code(admin: Requests, pod: str) -> str | None:
    """Of the pod's container, once it has ended."""
    for state in admin.ask("GET", pod)["status"].get("containerStatuses", []):
        if ended := state["state"].get("terminated"):
            return str(ended["exitCode"])
    return None
