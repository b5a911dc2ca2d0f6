"""The TrainJob of a step as plain data: its name, labels, nodes and processes. Talks to nobody."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

from nvila.components.contracts.errors import ConfigError
from nvila.components.contracts.store import KEY_CHARACTERS
from nvila.components.runner.execute import RUN_VARIABLE, STORE_VARIABLE
from nvila.components.runner.work import Work

API = "trainer.kubeflow.org/v1alpha1"
RUNTIME_VARIABLE = "NVILA_TRAINING_RUNTIME"
"""Environment variable: the ClusterTrainingRuntime that jobs are made from."""
GPUS_VARIABLE = "NVILA_GPUS_PER_NODE"
"""Environment variable: GPUs of a node; 0 asks for none and runs processes on the CPU."""
QUEUE_VARIABLE = "NVILA_QUEUE"
"""Environment variable: Kueue's LocalQueue; empty leaves Kueue out."""
CPU_VARIABLE, MEMORY_VARIABLE = "NVILA_NODE_CPU", "NVILA_NODE_MEMORY"
"""Environment variables: what a whole node of the runtime has, as Kubernetes writes it. Smaller jobs get a share."""
RESOURCE_VARIABLE = "NVILA_GPU_RESOURCE"
"""Environment variable: name under which the cluster counts GPUs."""

STEP_LABEL, KEY_LABEL, RUN_LABEL = "nvila.io/step", "nvila.io/key", "nvila.io/run"
QUEUE_LABEL = "kueue.x-k8s.io/queue-name"
ATTEMPT = "nvila.io/attempt"
"""Annotation: which of the folders of the step's assignments this job works on."""
_LABEL_CHARACTERS = 63


@dataclass(frozen=True)
class Nodes:
    """What the jobs of this site are made of; a process stands for a GPU."""

    runtime: str = "nvila-torch"
    gpus_per_node: int = 8
    cpu: str = "96"
    """Of a whole node, like `memory`."""
    memory: str = "1200Gi"
    gpu_resource: str = "nvidia.com/gpu"
    queue: str = ""

    @classmethod
    def from_environment(cls) -> Nodes:
        """Read the variables that the site's ConfigMap gives to every step.

        Raises:
            ConfigError: a number that is none.
        """
        return cls(
            runtime=os.environ.get(RUNTIME_VARIABLE) or cls.runtime,
            gpus_per_node=_number(GPUS_VARIABLE, cls.gpus_per_node),
            cpu=os.environ.get(CPU_VARIABLE) or cls.cpu,
            memory=os.environ.get(MEMORY_VARIABLE) or cls.memory,
            gpu_resource=os.environ.get(RESOURCE_VARIABLE) or cls.gpu_resource,
            queue=os.environ.get(QUEUE_VARIABLE, ""),
        )

    def share(self, processes: int) -> tuple[int, int]:
        """Nodes, and processes on each, for so many processes.

        Raises:
            ConfigError: they do not fill whole nodes.
        """
        if processes <= self.gpus_per_node or self.gpus_per_node == 0:
            return 1, processes
        if processes % self.gpus_per_node:
            raise ConfigError(
                f"the processes do not fill nodes of {self.gpus_per_node} GPUs",
                where="train.gpus",
                value=processes,
                do=f"Ask for a multiple of {self.gpus_per_node}, or for fewer than that.",
            )
        return processes // self.gpus_per_node, self.gpus_per_node


def job_name(work: Work) -> str:
    """Name of the job: the same work has the same name, so that it is never made twice."""
    return f"nvila-{work.step}-{work.key[:KEY_CHARACTERS]}"


def label(text: str) -> str:
    """`text` as Kubernetes takes it for the value of a label."""
    return re.sub(r"[^A-Za-z0-9._-]", "-", text)[:_LABEL_CHARACTERS].strip("._-")


def train_job(work: Work, attempt: str, assignment: Path, nodes: Nodes) -> dict[str, Any]:
    """The TrainJob that does this work. Its runtime brings image, volumes, environment and failure policies."""
    count, processes = nodes.share(_processes(work.settings))
    labels = {STEP_LABEL: work.step, KEY_LABEL: label(work.key), RUN_LABEL: label(work.run_dir.name)}
    if nodes.queue:
        labels[QUEUE_LABEL] = nodes.queue
    environment = {STORE_VARIABLE: str(work.out.parents[1]), RUN_VARIABLE: str(work.run_dir)}
    return {
        "apiVersion": API,
        "kind": "TrainJob",
        "metadata": {"name": job_name(work), "labels": labels, "annotations": {ATTEMPT: attempt}},
        "spec": {
            "runtimeRef": {"apiGroup": API.partition("/")[0], "kind": "ClusterTrainingRuntime", "name": nodes.runtime},
            "trainer": {
                "command": ["python", "-m", "nvila.components.runner.node", str(assignment)],
                "numNodes": count,
                "numProcPerNode": processes,
                "env": [{"name": name, "value": value} for name, value in environment.items()],
            }
            | _resources(processes, nodes),
        },
    }


def _processes(settings: Mapping[str, Any]) -> int:
    """What the slice of a train step asks for; pruning and evaluation are one process that starts its own."""
    return int(settings.get("run", {}).get("gpus", 1))


def _resources(processes: int, nodes: Nodes) -> dict[str, Any]:
    """What a job that does not fill its node asks for. Whole nodes are as the runtime has them, with network devices.

    A job's own resources take the place of all of the runtime's, so CPU and memory belong to them.
    """
    if processes >= nodes.gpus_per_node:
        return {}
    part = Fraction(processes, nodes.gpus_per_node)
    wanted = {
        "cpu": f"{int(_quantity(CPU_VARIABLE, nodes.cpu) * part * 1000)}m",
        "memory": f"{int(_quantity(MEMORY_VARIABLE, nodes.memory) * part) >> 20}Mi",
        nodes.gpu_resource: str(processes),
    }
    return {"resourcesPerNode": {"requests": wanted, "limits": dict(wanted)}}


def _quantity(name: str, text: str) -> Fraction:
    """A quantity as Kubernetes writes it, such as `500m` or `1200Gi`, in cores or bytes."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)(m|[kMGTP]|[KMGTP]i|)", text)
    if not found:
        raise ConfigError("not a quantity of Kubernetes, such as 96 or 1200Gi", where=name, value=text)
    number, unit = Fraction(found[1]), found[2]
    if unit == "m":
        return number / 1000
    power = "kMGTP".index(unit[0].replace("K", "k")) + 1 if unit else 0
    return number * (1024 if unit.endswith("i") else 1000) ** power


def _number(name: str, default: int) -> int:
    text = os.environ.get(name, "")
    if text and not text.isdecimal():
        raise ConfigError("not a whole number", where=name, value=text)
    return int(text) if text else default
