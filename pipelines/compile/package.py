"""Compiles the same pipeline for a Kubeflow cluster: images, volumes, environment, retries; then checks it.

One compiled pipeline serves every recipe and every site: what a step's pod asks for and where it goes are outputs of
`resolve`, see `contracts/placement.py`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, Literal

import yaml
from google.protobuf.json_format import MessageToDict
from kfp import kubernetes
from kfp.dsl.pipeline_task import PipelineTask

from nvila.components.contracts.environment import name_of, named
from nvila.components.contracts.errors import ConfigError, NvilaError
from nvila.components.contracts.manifest import digest_json
from nvila.components.contracts.pipelines import PIPELINES, PipelineName
from nvila.components.contracts.placement import GPU_RESOURCE, ON_GPUS, Placement, sources
from nvila.components.contracts.steps import Step
from nvila.components.runner.code import code_digest
from nvila.components.runner.image import IMAGE, QUANTIZE_IMAGE
from nvila.pipelines.build import build
from nvila.pipelines.compile import names as site
from nvila.pipelines.compile.references import dangling_references

Format = Literal["pipeline", "manifests"]
"""`pipeline`: KFP's own YAML, for the UI and its API. `manifests`: Pipeline and PipelineVersion resources."""
SIZE_LIMIT_BYTES = 200 * 1024
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


def compile_pipeline(
    path: Path,
    image: str = IMAGE,
    quantize_image: str = QUANTIZE_IMAGE,
    *,
    pipeline: PipelineName = "lifecycle",
    format: Format = "pipeline",
) -> int:
    """Write the pipeline as YAML and return its size in bytes.

    Raises:
        ConfigError: an image has white space in it, or the file cannot be written.
        NvilaError: a reference leads nowhere, or the file is too large; both are faults of ours.
    """
    spec, platform = compiled(image, quantize_image, pipeline)
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
    image: str = IMAGE, quantize_image: str = QUANTIZE_IMAGE, pipeline: PipelineName = "lifecycle"
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
    # KFP looks at the whole call stack some 170 times; on a thread it is short, however deep the caller's is.
    with ThreadPoolExecutor(1) as thread:
        place = partial(_place, pipeline=pipeline, code=code)
        built = thread.submit(copy_context().run, build, place, PIPELINES[pipeline]).result()
    spec, platform = (MessageToDict(part) for part in (built.pipeline_spec, built.platform_spec))
    for executor in spec["deploymentSpec"]["executors"].values():
        executor["container"]["image"] = images[executor["container"]["image"]]
    if dangling := list(dangling_references(spec)):
        raise NvilaError("the compiled pipeline has references that lead nowhere", value=dangling)
    return spec, platform


def manifests(spec: Mapping[str, Any], platform: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Pipeline and PipelineVersion resources (pipelines.kubeflow.org/v2beta1), for KFP's Kubernetes-native mode.

    A version cannot be changed once it exists, so its name carries the digest of what is in it.
    """
    name, version = resource_name(spec["pipelineInfo"]["name"]), version_name(spec, platform)
    description = spec["pipelineInfo"].get("description", "")
    return [
        {
            "apiVersion": "pipelines.kubeflow.org/v2beta1",
            "kind": kind,
            "metadata": {"name": called},
            "spec": {"displayName": display_name, "description": description, **rest},
        }
        for kind, called, display_name, rest in (
            ("Pipeline", name, spec["pipelineInfo"]["displayName"], {}),
            (
                "PipelineVersion",
                version,
                version,
                {"pipelineName": name, "pipelineSpec": dict(spec), "platformSpec": dict(platform)},
            ),
        )
    ]


def resource_name(pipeline: str) -> str:
    """Name of the Pipeline resource, and of what `nvila submit` uploads, by the pipeline's own."""
    return f"nvila-{pipeline}"


def version_name(spec: Mapping[str, Any], platform: Mapping[str, Any]) -> str:
    """Name of the version with this content."""
    name = resource_name(spec["pipelineInfo"]["name"])
    return f"{name}-{digest_json([spec, platform])[:12]}"


def _place(task: PipelineTask, row: Step, places: Mapping[str, Any], pipeline: PipelineName, code: str | None) -> None:
    """Everything that only a cluster knows of a task."""
    _ask(task, row, places)
    if not row.at_exit:  # KFP retries no exit task
        task.set_retry(RETRIES, backoff_duration="30s", backoff_factor=2.0, backoff_max_duration=f"{RETRY_SECONDS}s")
    if row.quick:
        kubernetes.set_timeout(task, QUICK_SECONDS)
    else:
        for name, value in STAYS.items():
            kubernetes.add_pod_annotation(task, name, value)
    kubernetes.mount_pvc(task, pvc_name=site.VOLUME_CLAIM, mount_path=site.MOUNT)
    kubernetes.mount_pvc(task, pvc_name=site.CACHE_CLAIM, mount_path=site.CACHE_MOUNT)
    kubernetes.use_config_map_as_volume(task, site.CERTIFICATES, mount_path=site.CERTIFICATES_MOUNT, optional=True)
    kubernetes.use_config_map_as_env(task, site.CONFIG_MAP, {key: key for key in site.CONFIG_KEYS}, optional=True)
    secrets = {key: key for key in map(name_of, row.secrets)}
    kubernetes.use_secret_as_env(task, site.SECRET, secrets, optional=True)
    run_id = name_of("run_id")
    kubernetes.use_field_path_as_env(task, env_name=run_id, field_path="metadata.labels['pipeline/runid']")
    given = named(store=f"{site.MOUNT}/store", run=f"{site.MOUNT}/runs/${run_id}", root=site.MOUNT, pipeline=pipeline)
    for name, value in (given | (named(code=code) if code else {})).items():
        task.set_env_variable(name, value)


def _ask(task: PipelineTask, row: Step, places: Mapping[str, Any]) -> None:
    """Resources and nodes; `resolve` says at run time what depends on the recipe and the site."""
    source = sources().get(row.name, {})
    wanted = asdict(Placement()) | {part: places[name] for part, name in source.items()}
    task.set_cpu_request(wanted["cpu"]).set_cpu_limit(wanted["cpu"])
    task.set_memory_request(wanted["memory"]).set_memory_limit(wanted["memory"])
    if source:
        kubernetes.add_toleration_json(task, wanted["tolerations"])
        kubernetes.add_node_selector_json(task, wanted["node_labels"])
    if row.size in ON_GPUS:
        task.set_accelerator_type(places[GPU_RESOURCE]).set_accelerator_limit(wanted["gpus"])
        # For vLLM, data-loading workers and NCCL: a container has 64 MiB unless told. It counts as the pod's memory.
        kubernetes.empty_dir_mount(task, volume_name="shm", mount_path="/dev/shm", medium="Memory")
