"""Compiles the same pipeline for a Kubeflow cluster: resources, volumes, image, and a check of every reference."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from kfp import compiler, kubernetes
from kfp.dsl.pipeline_task import PipelineTask

from nvila.components.contracts.errors import ConfigError, NvilaError
from nvila.components.runner.execute import RUN_VARIABLE, STORE_VARIABLE
from nvila.components.runner.image import IMAGE
from nvila.pipelines.lifecycle import build

SIZE_LIMIT_BYTES = 400 * 1024
"""Kubernetes objects end at about 1 MiB, and the workflow made from this file is larger than the file."""
VOLUME_CLAIM = "nvila"
"""Claim (read-write-many) that holds the store and the run folders, mounted in every step."""
MOUNT = "/nvila"


@dataclass(frozen=True)
class Resources:
    """What a step asks of the cluster: its request and its limit."""

    cpus: int = 2
    memory_gib: int = 8
    gpus: int = 0
    shared_memory_gib: int = 0
    """Size of /dev/shm, for data-loading workers and NCCL; part of the memory."""


SMALL = Resources()
ONE_GPU = Resources(cpus=12, memory_gib=160, gpus=1, shared_memory_gib=16)
WHOLE_NODE = Resources(cpus=96, memory_gib=1200, gpus=8, shared_memory_gib=128)
RESOURCES = {
    "validate": Resources(cpus=16, memory_gib=64),
    "base": ONE_GPU,
    "prune-image": ONE_GPU,
    "prune-video": ONE_GPU,
    **{f"train-{stage}": WHOLE_NODE for stage in range(1, 6)},
    "evaluate": ONE_GPU,
    "quantize": ONE_GPU,
    "evaluate-quantized": ONE_GPU,
    "rollout": ONE_GPU,
}
"""By step; a step that is not named is small."""


def compile_pipeline(path: Path, image: str = IMAGE) -> int:
    """Write the pipeline as KFP YAML and return its size in bytes.

    Raises:
        ConfigError: the image has white space in it.
        NvilaError: a reference leads nowhere, or the file is too large; both are faults of ours.
    """
    if not image or re.search(r"\s", image):
        raise ConfigError("not a container image", where="--image", value=image)
    partial = path.with_name(f".{path.name}.partial.yaml")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        compiler.Compiler().compile(build(_place), str(partial))
        documents = list(yaml.safe_load_all(partial.read_text(encoding="utf-8")))
        for executor in documents[0]["deploymentSpec"]["executors"].values():
            executor["container"]["image"] = image
        if dangling := list(dangling_references(documents[0])):
            raise NvilaError("the compiled pipeline has references that lead nowhere", value=dangling)
        partial.write_text(yaml.safe_dump_all(documents, sort_keys=True), encoding="utf-8")
        size_bytes = partial.stat().st_size
        if size_bytes >= SIZE_LIMIT_BYTES:
            raise NvilaError("the compiled pipeline is too large", value=size_bytes)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    return size_bytes


def dangling_references(spec: Mapping[str, Any]) -> Iterator[str]:
    """References between tasks, inputs, outputs and components that lead nowhere; KFP's own loader accepts them."""
    components = spec["components"]
    executors = spec["deploymentSpec"]["executors"]
    for name, component in {"root": spec["root"], **components}.items():
        if "executorLabel" in component and component["executorLabel"] not in executors:
            yield f"{name}: executor {component['executorLabel']}"
        for task_name, task in component.get("dag", {}).get("tasks", {}).items():
            for problem in _dangling_in_task(task, component, components):
                yield f"{name}/{task_name}: {problem}"


def _dangling_in_task(
    task: Mapping[str, Any], parent: Mapping[str, Any], components: Mapping[str, Any]
) -> Iterator[str]:
    siblings = parent["dag"]["tasks"]
    own = components.get(task["componentRef"]["name"])
    if own is None:
        yield f"component {task['componentRef']['name']}"
        return
    yield from (f"dependent task {name}" for name in task.get("dependentTasks", []) if name not in siblings)
    for group in ("parameters", "artifacts"):
        declared = own.get("inputDefinitions", {}).get(group, {})
        given = task.get("inputs", {}).get(group, {})
        yield from (f"{group}: {key} is not an input" for key in given if key not in declared)
        required = {
            key for key, value in declared.items() if not value.get("isOptional") and "defaultValue" not in value
        }
        yield from (f"{group}: {key} is not given" for key in sorted(required - set(given)))
        for key, source in given.items():
            if not _resolves(source, group, parent, siblings, components):
                yield f"{group}: {key} <- {source}"


def _resolves(
    source: Mapping[str, Any],
    group: str,
    parent: Mapping[str, Any],
    siblings: Mapping[str, Any],
    components: Mapping[str, Any],
) -> bool:
    """Whether what feeds an input exists: an input of the surrounding DAG, another task's output, or a constant."""
    for kind in ("componentInputParameter", "componentInputArtifact"):
        if kind in source:
            return source[kind] in parent.get("inputDefinitions", {}).get(group, {})
    for kind, key in (("taskOutputParameter", "outputParameterKey"), ("taskOutputArtifact", "outputArtifactKey")):
        if kind in source:
            producer = siblings.get(source[kind]["producerTask"])
            made = components.get(producer["componentRef"]["name"], {}) if producer else {}
            return source[kind][key] in made.get("outputDefinitions", {}).get(group, {})
    if "taskFinalStatus" in source:
        return source["taskFinalStatus"]["producerTask"] in siblings
    return "runtimeValue" in source


def _place(task: PipelineTask, step: str) -> None:
    """Resources, the shared volume, and where the store and the run's folder lie on it."""
    wanted = RESOURCES.get(step, SMALL)
    task.set_cpu_request(str(wanted.cpus)).set_cpu_limit(str(wanted.cpus))
    task.set_memory_request(f"{wanted.memory_gib}Gi").set_memory_limit(f"{wanted.memory_gib}Gi")
    if wanted.gpus:
        task.set_accelerator_type("nvidia.com/gpu").set_accelerator_limit(wanted.gpus)
    if wanted.shared_memory_gib:
        kubernetes.empty_dir_mount(
            task, volume_name="shm", mount_path="/dev/shm", medium="Memory", size_limit=f"{wanted.shared_memory_gib}Gi"
        )
    kubernetes.mount_pvc(task, pvc_name=VOLUME_CLAIM, mount_path=MOUNT)
    kubernetes.use_field_path_as_env(task, env_name="NVILA_RUN_ID", field_path="metadata.labels['pipeline/runid']")
    task.set_env_variable(STORE_VARIABLE, f"{MOUNT}/store")
    task.set_env_variable(RUN_VARIABLE, f"{MOUNT}/runs/$NVILA_RUN_ID")
