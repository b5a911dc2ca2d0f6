"""What a cluster lacks for a model to be served there: the kind ModelRollout, the Gateway, quota for two versions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import suppress
from decimal import Decimal

from nvila.components.contracts.environment import Environment, name_of
from nvila.components.contracts.errors import ConfigError
from nvila.components.contracts.serving import Gateway, Pods, Serving
from nvila.components.kube.cluster import QUOTA, Cluster, Kind
from nvila.components.kube.connect import connect
from nvila.components.kube.errors import Away, Denied, NoCluster, NotServed
from nvila.components.kube.requests import Patience, Requests
from nvila.components.kube.rollouts import ADVICE, Rollouts, serving_of
from nvila.components.preflight import checks
from nvila.components.tracking.connect import is_shared

GATEWAY_GROUP = "gateway.networking.k8s.io"
VERSIONS = 2
"""A new version's pods run beside the champion's."""
_SECONDS = 10
_OWN = (
    f"the registry is a file of this machine, which no controller reads; set {name_of('mlflow_tracking_uri')} to the "
    "server that the cluster's asks"
)


def problems(model: str, here: Environment) -> list[str]:
    """Everything that would stop a rollout of this model, one line each; what this account may not look at is left to
    the controller, which says it in the ModelRollout's status."""
    found = [] if is_shared() else [f"rollout.target: {_OWN}"]
    try:
        cluster = Cluster(Requests(connect(here.kubeconfig), Patience.once(_SECONDS), ADVICE))
        serving = serving_for(cluster, model, here)
        for lacking in (gateway_problems(cluster, serving.gateway), quota_problems(cluster, serving.pods)):
            with suppress(Denied):
                found += lacking
    except Away as error:
        found.append(checks.Away(f"rollout.target: {error}"))
    except NoCluster as error:
        found.append(f"rollout.target: there is no cluster here that could serve the model: {error}; set KUBECONFIG")
    except (ConfigError, NotServed, Denied) as error:
        found.append(f"rollout.target: {error}")
    return found


def serving_for(cluster: Cluster, model: str, here: Environment) -> Serving:
    """What a version of the model will be served with: as its ModelRollout says, or what a run would make one of.

    Raises:
        ConfigError: neither says it, or several do.
        ApiError: the cluster does not answer, or serves no ModelRollout.
    """
    found = Rollouts(cluster).of_model(model)
    return found.spec if found else serving_of(cluster, here)


def gateway_problems(cluster: Cluster, gateway: Gateway) -> Iterator[str]:
    """Whether the Gateway is there."""
    version = cluster.served_version(GATEWAY_GROUP, "gateways")
    if version is None:
        yield f"the cluster knows no Gateway; install the Gateway API ({GATEWAY_GROUP})"
        return
    namespace = gateway.namespace or cluster.namespace
    if cluster.get(Kind(version, "Gateway", "gateways"), gateway.name, namespace=namespace) is None:
        yield f"there is no Gateway {gateway.name} in namespace {namespace}, through which users are to come in"


def quota_problems(cluster: Cluster, pods: Pods) -> Iterator[str]:
    """Where a ResourceQuota can never hold two versions at once."""
    wanted = need(pods, VERSIONS)
    for quota in cluster.find(QUOTA):
        for key, most in quota.get("spec", {}).get("hard", {}).items():
            if key in wanted and amount(most) < wanted[key]:
                yield (
                    f"ResourceQuota {quota['metadata']['name']} allows {most} of {key}, and a new version beside the "
                    f"champion takes {wanted[key]:f} ({VERSIONS} x {pods.replicas} pods)"
                )


def need(pods: Pods, versions: int) -> Mapping[str, Decimal]:
    """What the pods of so many versions ask for, by the keys of a ResourceQuota."""
    count = versions * pods.replicas
    memory, cpu, gpus = amount(pods.memory) * count, amount(pods.cpu) * count, Decimal(pods.gpus * count)
    return {
        **dict.fromkeys(("memory", "requests.memory", "limits.memory"), memory),
        **dict.fromkeys(("cpu", "requests.cpu"), cpu),
        f"requests.{pods.gpu_resource}": gpus,
        **dict.fromkeys(("pods", "count/pods"), Decimal(count)),
    }


def amount(quantity: str | int) -> Decimal:
    """As Kubernetes writes it: 1k is 1000."""
    from kubernetes.utils.quantity import parse_quantity

    return parse_quantity(quantity)  # type: ignore[no-any-return]
