"""What a cluster would refuse a run for: definitions, runtime, claims, credentials, quota and nodes. It only reads."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from nvila.components.contracts.errors import ConfigError
from nvila.components.contracts.recipe.recipe import Recipe
from nvila.components.contracts.site import KEY, Site
from nvila.components.kube.cluster import NAMESPACE, NODE, QUOTA, SECRET, VOLUME_CLAIM, Cluster, Kind
from nvila.components.kube.connect import connect
from nvila.components.kube.errors import Denied, NoCluster
from nvila.components.kube.requests import Patience, Requests
from nvila.components.kube.rollouts import ADVICE, site_settings
from nvila.pipelines.compile import names

PRODUCT_LABEL = "nvidia.com/gpu.product"
TRAINER, KUEUE = "trainer.kubeflow.org", "kueue.x-k8s.io"
TIMEOUT_SECONDS = 10


@dataclass(frozen=True)
class Finding:
    """One thing about the cluster."""

    refused: bool
    """Whether the run cannot come through; else it is worth knowing."""
    text: str


@dataclass(frozen=True)
class Need:
    """What a recipe asks of a cluster."""

    gpus: int
    """Processes of the largest training stage."""
    can_do_without: bool
    """Small models train on CPUs as well."""
    s3: bool
    hub: bool

    @classmethod
    def of(cls, recipe: Recipe, *, small: bool) -> Need:
        """Of a recipe, whose model is `small` or not (`shape.is_small`)."""
        uris = [*recipe.weights, *(source.path for source in recipe.data.sources)]
        return cls(
            gpus=recipe.train.gpus,
            can_do_without=small,
            s3=any(uri.startswith("s3://") for uri in uris),
            hub=any(uri.startswith("hf://") for uri in uris),
        )


def configured(kubeconfig: str | None, namespace: str | None) -> Cluster | None:
    """The cluster of the current context, or the one that this process runs in; None where none is configured.

    Raises:
        PreflightError: the kubeconfig cannot be used.
    """
    default = Path("~/.kube/config").expanduser()
    try:
        connection = connect(kubeconfig or (str(default) if default.is_file() else None), namespace)
    except NoCluster:
        return None
    return Cluster(Requests(connection, Patience.once(TIMEOUT_SECONDS), ADVICE))


def look(cluster: Cluster, need: Need, gpu: str) -> tuple[Site, list[Finding]]:
    """The cluster's site, and everything that is wrong or worth knowing, what is refused first.

    Raises:
        ApiError: the cluster does not answer, or lets nobody in.
    """
    settings = site_settings(cluster)
    site, old = Site.read(settings) or Site(), Site.notice(settings)
    if site.gpus_per_node == 0:  # jobs of this site run on CPUs and ask for no GPU
        need = replace(need, gpus=0)
    findings = [Finding(False, f"ConfigMap {names.CONFIG_MAP}: {old}")] if old else []
    for what, check in (
        ("the namespace", lambda: _namespace(cluster)),
        ("the volume claims", lambda: _claims(cluster)),
        ("the training runtime", lambda: _runtime(cluster, site, need)),
        ("the credentials", lambda: _credentials(cluster, site, need)),
        ("the quota", lambda: _quota(cluster, site, need)),
        ("the queue", lambda: _queue(cluster, site, need)),
        ("the nodes", lambda: _nodes(cluster, site, need, gpu)),
    ):
        findings += allowed(what, check)
    return site, sorted(findings, key=lambda finding: not finding.refused)


def allowed(what: str, check: Callable[[], Iterator[Finding]]) -> list[Finding]:
    """What a check finds; that this account may not look is a remark."""
    try:
        return list(check())
    except Denied:
        return [Finding(False, f"{what}: this account may not look, so it is not checked")]


def _namespace(cluster: Cluster) -> Iterator[Finding]:
    if cluster.get(NAMESPACE, cluster.namespace) is None:
        yield Finding(True, f"there is no namespace {cluster.namespace}; give --namespace")


def _claims(cluster: Cluster) -> Iterator[Finding]:
    for name in (names.VOLUME_CLAIM, names.CACHE_CLAIM):
        claim = cluster.get(VOLUME_CLAIM, name)
        if claim is None:
            yield Finding(
                True, f"there is no volume claim {name} in {cluster.namespace}; the chart makes it, or give --namespace"
            )
        elif (phase := claim.get("status", {}).get("phase")) != "Bound":
            yield Finding(False, f"the volume claim {name} is {phase}: pods wait for its volume")


def _runtime(cluster: Cluster, site: Site, need: Need) -> Iterator[Finding]:
    if not site.launcher:
        yield Finding(
            False,
            f"ConfigMap {names.CONFIG_MAP} names no launcher: every step works in its own pod; "
            "the chart's pipelines.launch says so",
        )
        if need.gpus > site.gpus_per_node:
            yield Finding(True, f"{need.gpus} processes do not fit one pod; training jobs need Kubeflow Trainer")
        return
    try:
        site.share(need.gpus)
    except ConfigError as error:
        yield Finding(True, str(error))
    version = cluster.served_version(TRAINER, "trainjobs")
    if version is None:
        yield Finding(True, f"the cluster knows no TrainJob; install Kubeflow Trainer ({TRAINER})")
        return
    name = site.training_runtime
    runtimes = Kind(version, "ClusterTrainingRuntime", "clustertrainingruntimes", namespaced=False)
    if cluster.get(runtimes, name) is None:
        yield Finding(True, f"there is no ClusterTrainingRuntime {name}; the chart makes it")


def _credentials(cluster: Cluster, site: Site, need: Need) -> Iterator[Finding]:
    secret = cluster.get(SECRET, names.SECRET)
    keys = set((secret or {}).get("data") or {})
    aws = {"AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"}
    if need.s3 and (missing := sorted(aws - keys)):
        yield Finding(True, f"the recipe names s3:// and Secret {names.SECRET} has no {' and no '.join(missing)}")
    if need.hub and "HF_TOKEN" not in keys:
        yield Finding(False, f"Secret {names.SECRET} has no HF_TOKEN: hf:// weights must be public, or in the cache")


def _quota(cluster: Cluster, site: Site, need: Need) -> Iterator[Finding]:
    key = f"requests.{site.gpu_resource}"
    for quota in cluster.find(QUOTA):
        hard = quota.get("spec", {}).get("hard", {}).get(key)
        if hard is None:
            continue
        used, name = _count(quota.get("status", {}).get("used", {}).get(key, 0)), quota["metadata"]["name"]
        if _count(hard) < need.gpus:
            yield Finding(
                not need.can_do_without,
                f"ResourceQuota {name} allows {_count(hard)} GPUs, a stage asks for {need.gpus}",
            )
        elif _count(hard) - used < need.gpus:
            yield Finding(
                False, f"ResourceQuota {name}: {used} of {_count(hard)} GPUs are taken, a stage asks for {need.gpus}"
            )


def _queue(cluster: Cluster, site: Site, need: Need) -> Iterator[Finding]:
    name = site.queue
    if not name or not site.launcher:
        return
    version = cluster.served_version(KUEUE, "localqueues")
    if version is None:
        yield Finding(True, f"{KEY} names queue {name}, and the cluster knows no LocalQueue; install Kueue ({KUEUE})")
        return
    local = cluster.get(Kind(version, "LocalQueue", "localqueues"), name)
    if local is None:
        yield Finding(True, f"there is no LocalQueue {name} in {cluster.namespace}")
        return
    queue = str(local["spec"].get("clusterQueue"))
    found = cluster.get(Kind(version, "ClusterQueue", "clusterqueues", namespaced=False), queue)
    if found is None:
        yield Finding(True, f"LocalQueue {name} leads to ClusterQueue {queue}, which is not there")
        return
    spec = found["spec"]
    quota = sum(
        _count(resource["nominalQuota"])
        for group in spec.get("resourceGroups", [])
        for flavor in group.get("flavors", [])
        for resource in flavor.get("resources", [])
        if resource["name"] == site.gpu_resource
    )
    if quota < need.gpus:
        cohort = spec.get("cohort") or spec.get("cohortName")
        borrow = f"; it may borrow from cohort {cohort}" if cohort else ""
        yield Finding(
            not (cohort or need.can_do_without),
            f"ClusterQueue {queue} holds {quota} GPUs, a stage asks for {need.gpus}: never admitted{borrow}",
        )


def _nodes(cluster: Cluster, site: Site, need: Need, gpu: str) -> Iterator[Finding]:
    if not need.gpus:
        return
    nodes = [node for node in cluster.find(NODE) if takes_pods(node)]
    each = min(need.gpus, site.gpus_per_node)
    wanted = math.ceil(need.gpus / each)
    resource = site.gpu_resource
    fitting = [n for n in nodes if _count(n.get("status", {}).get("allocatable", {}).get(resource, 0)) >= each]
    if len(fitting) < wanted:
        refused = not need.can_do_without
        instead = "" if refused else "; take the chart's pipelines.launch=cpu"
        yield Finding(
            refused,
            f"a stage asks for {wanted} nodes of {each} GPUs, {len(fitting)} of {len(nodes)} nodes have them{instead}",
        )
    roomy = [node for node in fitting if _has_room(node, site, each)]
    if len(roomy) < wanted <= len(fitting):
        yield Finding(
            not need.can_do_without,
            f"{len(roomy)} of {len(fitting)} nodes with GPUs have the CPUs and memory that a stage's pod asks for (a "
            f"whole node {site.node_cpu} and {site.node_memory}): it would wait for ever; "
            "lower the chart's trainer.cpu and trainer.memory",
        )
    products = {n["metadata"].get("labels", {}).get(PRODUCT_LABEL) for n in fitting} - {None}
    if products and not any(gpu.upper() in str(product).upper() for product in products):
        yield Finding(False, f"the GPUs are {', '.join(sorted(map(str, products)))}, this plan counts with {gpu}")


def _has_room(node: Mapping[str, Any], site: Site, processes: int) -> bool:
    """Whether what belongs to so many GPUs fits what the node gives to pods; others may hold a part of it now."""
    from kubernetes.utils.quantity import parse_quantity

    offered = node["status"]["allocatable"]
    return all(
        parse_quantity(whole) * processes <= parse_quantity(offered.get(key, 0)) * site.gpus_per_node
        for key, whole in (("cpu", site.node_cpu), ("memory", site.node_memory))
    )


def takes_pods(node: Mapping[str, Any]) -> bool:
    """Whether a node is ready and not cordoned."""
    conditions = node.get("status", {}).get("conditions", [])
    ready = any(c["type"] == "Ready" and c["status"] == "True" for c in conditions)
    return ready and not node.get("spec", {}).get("unschedulable")


def _count(quantity: str | int) -> int:
    """A number as Kubernetes writes it: 1000 is `1k`."""
    from kubernetes.utils.quantity import parse_quantity

    return int(parse_quantity(quantity))
