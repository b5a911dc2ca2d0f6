"""The TrainJob of a step as plain data: its name, labels, nodes and processes. Talks to nobody."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nvila.components.contracts.environment import named
from nvila.components.contracts.placement import share
from nvila.components.contracts.site import Site
from nvila.components.contracts.store import KEY_CHARACTERS
from nvila.components.runner.work import Work

API = "trainer.kubeflow.org/v1alpha1"
STEP_LABEL, KEY_LABEL, RUN_LABEL = "nvila.io/step", "nvila.io/key", "nvila.io/run"
QUEUE_LABEL = "kueue.x-k8s.io/queue-name"
ATTEMPT = "nvila.io/attempt"
"""Annotation: which of the folders of the step's assignments this job works on."""
_LABEL_CHARACTERS = 63


def job_name(work: Work) -> str:
    """Name of the job: the same work has the same name, so that it is never made twice."""
    return f"nvila-{work.step}-{work.key[:KEY_CHARACTERS]}"


def label(text: str) -> str:
    """`text` as Kubernetes takes it for the value of a label."""
    return re.sub(r"[^A-Za-z0-9._-]", "-", text)[:_LABEL_CHARACTERS].strip("._-")


def train_job(work: Work, attempt: str, assignment: Path, site: Site) -> dict[str, Any]:
    """The TrainJob that does this work. Its runtime brings image, volumes, environment and failure policies."""
    count, processes = site.share(_processes(work.settings, site))
    labels = {STEP_LABEL: work.step, KEY_LABEL: label(work.key), RUN_LABEL: label(work.run_dir.name)}
    if site.queue:
        labels[QUEUE_LABEL] = site.queue
    environment = named(store=work.out.parents[1], run=work.run_dir)
    return {
        "apiVersion": API,
        "kind": "TrainJob",
        "metadata": {"name": job_name(work), "labels": labels, "annotations": {ATTEMPT: attempt}},
        "spec": {
            "runtimeRef": {
                "apiGroup": API.partition("/")[0],
                "kind": "ClusterTrainingRuntime",
                "name": site.training_runtime,
            },
            "trainer": {
                "command": ["python", "-m", "nvila.components.runner.node", str(assignment)],
                "numNodes": count,
                "numProcPerNode": processes,
                "env": [{"name": name, "value": value} for name, value in environment.items()],
            }
            | _resources(processes, site),
        },
    }


def _processes(settings: Mapping[str, Any], site: Site) -> int:
    """What the slice of a train or prune step asks for. Pruning stays on one node, where it starts its own processes;
    evaluation is one."""
    if "prune" in settings:
        return min(int(settings["prune"].get("gpus", 1)), max(1, site.gpus_per_node))
    return int(settings.get("run", {}).get("gpus", 1))


def _resources(processes: int, site: Site) -> dict[str, Any]:
    """What a job that does not fill its node asks for. Whole nodes are as the runtime has them, with network devices.

    A job's own resources take the place of all of the runtime's, so CPU and memory belong to them.
    """
    if processes >= site.gpus_per_node:
        return {}
    cpu, memory = share(site, processes)
    wanted = {"cpu": cpu, "memory": memory, site.gpu_resource: str(processes)}
    return {"resourcesPerNode": {"requests": wanted, "limits": dict(wanted)}}
