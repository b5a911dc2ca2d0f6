"""What it takes to serve a recipe's model in pods: GPUs and memory of two versions, disk and time of the weights."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from nvila.components.contracts.environment import Environment
from nvila.components.contracts.errors import ConfigError
from nvila.components.contracts.recipe.quantize import QuantizeSettings
from nvila.components.contracts.recipe.recipe import Recipe
from nvila.components.contracts.recipe.rollout import TARGETS
from nvila.components.contracts.serving import Pods
from nvila.components.contracts.text import duration
from nvila.components.kube.cluster import NODE, QUOTA, Cluster
from nvila.components.kube.errors import Denied, NotServed
from nvila.components.model.shape import Shape
from nvila.components.preflight.serving import VERSIONS, amount, gateway_problems, need, quota_problems, serving_for
from nvila.pipelines.planning.checks import Finding, allowed, takes_pods

FETCH_BYTES_A_SECOND = 125 * 10**6
"""Assumed, not measured: weights come over a network of 1 Gbit/s."""
BYTES = {"W8A8": 1.0, "W4A16": 0.5 + 2 / 128, "none": 2.0}
"""Of a weight by scheme: int8; int4 with a scale of two bytes for each group of 128; bf16."""


@dataclass(frozen=True)
class ServingPlan:
    """What pods take; bytes are None where the model's sizes are not known."""

    pods: Pods
    """Of each version."""
    known: bool
    """Whether the cluster says so; else a chart without further values."""
    versions: int
    """At once."""
    gpus: int
    memory_bytes: int
    """Of all pods together."""
    weights_bytes: int | None
    """Of a version, on the disk of each node that it runs on."""
    fetch_seconds: float | None

    def lines(self) -> Iterator[str]:
        """For a person."""
        pods = self.pods
        whence = "as the cluster says" if self.known else "as the chart has it unless its values say otherwise"
        yield (
            f"serving takes {self.gpus} {pods.gpu_resource} and {self.memory_bytes / 2**30:.0f} GiB of memory while a "
            f"new version is tried: {self.versions} versions x {pods.replicas} pods of {pods.gpus} GPUs, "
            f"{pods.cpu} CPUs and {pods.memory}, {whence}"
        )
        if self.weights_bytes is not None and self.fetch_seconds is not None:
            yield (
                f"a version's weights take about {self.weights_bytes / 10**9:.2f} GB of each node's cache, and "
                f"{duration(self.fetch_seconds)} to fetch at the assumed {FETCH_BYTES_A_SECOND / 10**6:.0f} MB/s; a "
                "node that has them fetches nothing"
            )


def serving_plan(
    recipe: Recipe, shape: Shape | None, cluster: Cluster | None
) -> tuple[ServingPlan | None, list[Finding]]:
    """What serving takes, and what the cluster says to that; nothing of a recipe that is served elsewhere.

    Raises:
        ApiError: the cluster does not answer.
    """
    if not TARGETS[recipe.rollout.target].in_pods:
        return None, []
    pods, findings, known = Pods(), list[Finding](), False
    if cluster:
        try:
            # By the cluster's own ConfigMap: this machine's variables may be of another.
            serving = serving_for(cluster, recipe.register_.model_name, Environment())
        except (ConfigError, NotServed, Denied) as error:
            findings.append(Finding(not isinstance(error, Denied), str(error)))
        else:
            pods, known = serving.pods, True
            for what, check in (
                ("the Gateway", lambda: _refused(gateway_problems(cluster, serving.gateway))),
                ("the quota for serving", lambda: _refused(quota_problems(cluster, pods))),
                ("the quota for serving", lambda: _taken(cluster, pods)),
                ("the nodes for serving", lambda: _nodes(cluster, pods)),
            ):
                findings += [one for one in allowed(what, check) if one not in findings]
    size = weights_bytes(recipe.quantize, shape) if shape else None
    count = VERSIONS * pods.replicas
    plan = ServingPlan(
        pods=pods,
        known=known,
        versions=VERSIONS,
        gpus=count * pods.gpus,
        memory_bytes=int(count * amount(pods.memory)),
        weights_bytes=size,
        fetch_seconds=None if size is None else size / FETCH_BYTES_A_SECOND,
    )
    return plan, findings


def weights_bytes(quantize: QuantizeSettings, shape: Shape) -> int:
    """Of the registered model: blocks by their scheme, the rest in bf16."""
    blocks = shape.tower_matrices * BYTES[quantize.vision_tower] + shape.decoder_matrices * BYTES[quantize.llm]
    return int(blocks + 2 * (shape.total - shape.tower_matrices - shape.decoder_matrices))


def _refused(problems: Iterator[str]) -> Iterator[Finding]:
    yield from (Finding(True, problem) for problem in problems)


def _taken(cluster: Cluster, pods: Pods) -> Iterator[Finding]:
    """Where a quota could hold the pods, and others have taken it: they may end before the rollout begins."""
    wanted = need(pods, 1)
    for quota in cluster.find(QUOTA):
        used = quota.get("status", {}).get("used", {})
        for key, most in quota.get("spec", {}).get("hard", {}).items():
            if key in wanted and amount(most) - amount(used.get(key, 0)) < wanted[key] <= amount(most):
                name = quota["metadata"]["name"]
                text = f"{used[key]} of {most} {key} are taken, a new version takes {wanted[key]:f}"
                yield Finding(False, f"ResourceQuota {name}: {text}")


def _nodes(cluster: Cluster, pods: Pods) -> Iterator[Finding]:
    """Whether nodes can hold the pods at all; others may hold a part of them now."""
    nodes = [node for node in cluster.find(NODE) if takes_pods(node) and _selected(node, pods)]
    places, wanted = sum(_places(node, pods) for node in nodes), VERSIONS * pods.replicas
    if places < wanted:
        yield Finding(
            True,
            f"{len(nodes)} nodes have room for {places} serving pods of {pods.gpus} {pods.gpu_resource}, {pods.cpu} "
            f"CPUs and {pods.memory}, and a new version beside the champion takes {wanted}",
        )


def _selected(node: dict[str, Any], pods: Pods) -> bool:
    return pods.node_selector.items() <= node["metadata"].get("labels", {}).items()


def _places(node: dict[str, Any], pods: Pods) -> int:
    offered = node.get("status", {}).get("allocatable", {})
    asked: dict[str, str | int] = {"cpu": pods.cpu, "memory": pods.memory, pods.gpu_resource: pods.gpus}
    return min(int(amount(offered.get(key, 0)) // amount(each)) for key, each in asked.items() if amount(each))
