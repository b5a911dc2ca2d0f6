"""Compiles the same pipeline for a Kubeflow cluster: images, resources, volumes, environment, retries; then checks it.

A heavy step (train, prune, evaluate) does its work in a training job where the site has a launcher, and its own pod
only starts and watches that job. So what its pod asks for depends on how the pipeline was compiled, see `Launch`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml
from google.protobuf.json_format import MessageToDict
from kfp import kubernetes
from kfp.dsl.pipeline_task import PipelineTask

from nvila.components.contracts.environment import name_of, named
from nvila.components.contracts.errors import ConfigError, NvilaError
from nvila.components.contracts.manifest import digest_json
from nvila.components.contracts.site import OLD_KEYS
from nvila.components.contracts.steps import Step
from nvila.components.runner.code import code_digest
from nvila.components.runner.image import IMAGE, QUANTIZE_IMAGE
from nvila.pipelines.compile import names as site
from nvila.pipelines.compile.references import dangling_references
from nvila.pipelines.lifecycle import build

Launch = Literal["jobs", "pods", "cpu"]
"""`jobs`: heavy steps start a training job and their pods are small. `pods`: every step works in its own pod, with
GPUs; for clusters without Kubeflow Trainer. `cpu`: the same without GPUs, enough for the recipes `micro` and `tiny`."""
Format = Literal["pipeline", "manifests"]
"""`pipeline`: KFP's own YAML, for the UI and its API. `manifests`: Pipeline and PipelineVersion resources."""
NAME = "nvila-lifecycle"
"""Of the Pipeline resource, and of the pipeline that `nvila submit` uploads."""
SIZE_LIMIT_BYTES = 400 * 1024
"""Kubernetes objects end at about 1 MiB, and the workflow made from this file is larger than the file."""
RETRIES = 2
"""For a step that has failed. KFP sets no policy, so Argo's own holds, OnFailure: a pod whose container ended with an
error is followed by another, one that was lost with its node is not. KFP cannot tell our exit codes apart, so it starts
a pod after a wrong input or a refusal as well; that one ends at once with the verdict of the first."""
RETRY_SECONDS = 90 * 24 * 3600
"""From the first start of a step on. Later no pod follows one that failed, and one that runs then is killed; so KFP's
`backoff_max_duration`, which limits no pause, has to be longer than any step takes."""
STAYS = {"cluster-autoscaler.kubernetes.io/safe-to-evict": "false", "karpenter.sh/do-not-disrupt": "true"}
"""Annotations of pods that wait for hours: autoscalers would move them to save a node, and a lost pod ends the run."""
QUICK_SECONDS = 3600
"""Longest life of a pod that has little to do. The others wait for queues, data and training: they have no limit."""


@dataclass(frozen=True)
class Resources:
    """What a step asks of the cluster: its request and its limit."""

    cpus: int = 1
    memory_gib: int = 4
    gpus: int = 0
    shared_memory_gib: int = 0
    """Size of /dev/shm, for data-loading workers and NCCL; part of the memory."""


SMALL = Resources()
ONE_GPU = Resources(cpus=12, memory_gib=160, gpus=1, shared_memory_gib=16)
SIZES = {
    "small": SMALL,
    "cpus": Resources(cpus=16, memory_gib=64),
    "memory": Resources(cpus=8, memory_gib=128),
    "gpu": ONE_GPU,
    "vllm": ONE_GPU,
    "node": Resources(cpus=96, memory_gib=1200, gpus=8, shared_memory_gib=128),
}
"""By `Step.size`."""
ON_CPU = {"vllm": Resources(shared_memory_gib=1)}
"""vLLM shares 160 MiB between its processes, and a container has 64 unless told."""


def resources(row: Step, launch: Launch) -> Resources:
    """What the pod of a step asks for; that of one whose work a job does only starts and watches the job."""
    if launch == "cpu":
        return ON_CPU.get(row.size, SMALL)
    return SMALL if row.job and launch == "jobs" else SIZES[row.size]


def compile_pipeline(
    path: Path,
    image: str = IMAGE,
    quantize_image: str = QUANTIZE_IMAGE,
    *,
    launch: Launch = "jobs",
    format: Format = "pipeline",
) -> int:
    """Write the pipeline as YAML and return its size in bytes.

    Raises:
        ConfigError: an image has white space in it, or the file cannot be written.
        NvilaError: a reference leads nowhere, or the file is too large; both are faults of ours.
    """
    spec, platform = compiled(image, quantize_image, launch=launch)
    documents = [spec, platform] if format == "pipeline" else manifests(spec, platform)
    text = yaml.safe_dump_all(documents, sort_keys=True)
    size_bytes = len(text.encode())
    if size_bytes >= SIZE_LIMIT_BYTES:
        raise NvilaError("the compiled pipeline is too large", value=size_bytes)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot be written: {error.strerror}", where=str(path)) from None
    return size_bytes


def compiled(
    image: str = IMAGE, quantize_image: str = QUANTIZE_IMAGE, *, launch: Launch = "jobs"
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The pipeline's specification and its platform part (volumes, environment), checked.

    Raises:
        ConfigError: an image has white space in it.
        NvilaError: a reference leads nowhere.
    """
    images = {IMAGE: image, QUANTIZE_IMAGE: quantize_image}
    for option, name in (("--image", image), ("--quantize-image", quantize_image)):
        if not name or re.search(r"\s", name):
            raise ConfigError("not a container image", where=option, value=name)
    if (image == IMAGE) != (quantize_image == QUANTIZE_IMAGE):
        raise ConfigError("name both images, or neither", where="--image and --quantize-image")
    # Without a named image nobody knows which code the steps will find in it.
    code = code_digest() if image != IMAGE else None
    pipeline = build(lambda task, row: _place(task, row, launch, code))
    spec, platform = (MessageToDict(part) for part in (pipeline.pipeline_spec, pipeline.platform_spec))
    for executor in spec["deploymentSpec"]["executors"].values():
        executor["container"]["image"] = images[executor["container"]["image"]]
    if dangling := list(dangling_references(spec)):
        raise NvilaError("the compiled pipeline has references that lead nowhere", value=dangling)
    return spec, platform


def manifests(spec: Mapping[str, Any], platform: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Pipeline and PipelineVersion resources (pipelines.kubeflow.org/v2beta1), for KFP's Kubernetes-native mode.

    A version cannot be changed once it exists, so its name carries the digest of what is in it.
    """
    version = version_name(spec, platform)
    description = spec["pipelineInfo"].get("description", "")
    return [
        {
            "apiVersion": "pipelines.kubeflow.org/v2beta1",
            "kind": kind,
            "metadata": {"name": name},
            "spec": {"displayName": display_name, "description": description, **rest},
        }
        for kind, name, display_name, rest in (
            ("Pipeline", NAME, spec["pipelineInfo"]["displayName"], {}),
            (
                "PipelineVersion",
                version,
                version,
                {"pipelineName": NAME, "pipelineSpec": dict(spec), "platformSpec": dict(platform)},
            ),
        )
    ]


def version_name(spec: Mapping[str, Any], platform: Mapping[str, Any]) -> str:
    """Name of the version with this content."""
    return f"{NAME}-{digest_json([spec, platform])[:12]}"


def _place(task: PipelineTask, row: Step, launch: Launch, code: str | None) -> None:
    """Everything that only a cluster knows of a task."""
    _ask(task, resources(row, launch))
    if not row.at_exit:  # KFP retries no exit task
        task.set_retry(RETRIES, backoff_duration="30s", backoff_factor=2.0, backoff_max_duration=f"{RETRY_SECONDS}s")
    if row.quick:
        kubernetes.set_timeout(task, QUICK_SECONDS)
    else:
        for name, value in STAYS.items():
            kubernetes.add_pod_annotation(task, name, value)
    kubernetes.mount_pvc(task, pvc_name=site.VOLUME_CLAIM, mount_path=site.MOUNT)
    kubernetes.mount_pvc(task, pvc_name=site.CACHE_CLAIM, mount_path=site.CACHE_MOUNT)
    unused = () if launch == "jobs" else (name_of("site"), *OLD_KEYS)  # of the launcher
    keys = [key for key in site.CONFIG_KEYS if key not in unused]
    kubernetes.use_config_map_as_env(task, site.CONFIG_MAP, {key: key for key in keys}, optional=True)
    kubernetes.use_secret_as_env(task, site.SECRET, {key: key for key in site.SECRET_KEYS}, optional=True)
    run_id = name_of("run_id")
    kubernetes.use_field_path_as_env(task, env_name=run_id, field_path="metadata.labels['pipeline/runid']")
    given = named(store=f"{site.MOUNT}/store", run=f"{site.MOUNT}/runs/${run_id}", root=site.MOUNT)
    for name, value in (given | (named(code=code) if code else {})).items():
        task.set_env_variable(name, value)


def _ask(task: PipelineTask, wanted: Resources) -> None:
    task.set_cpu_request(str(wanted.cpus)).set_cpu_limit(str(wanted.cpus))
    task.set_memory_request(f"{wanted.memory_gib}Gi").set_memory_limit(f"{wanted.memory_gib}Gi")
    if wanted.gpus:
        task.set_accelerator_type("nvidia.com/gpu").set_accelerator_limit(wanted.gpus)
    if wanted.shared_memory_gib:
        kubernetes.empty_dir_mount(
            task, volume_name="shm", mount_path="/dev/shm", medium="Memory", size_limit=f"{wanted.shared_memory_gib}Gi"
        )
