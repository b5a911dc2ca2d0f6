"""What a cluster's models are served with, as people decide it: the Gateway that users come through, and the pods."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import ConfigDict, Field, ValidationError
from pydantic.alias_generators import to_camel

from nvila.components.contracts.errors import ConfigError
from nvila.components.contracts.recipe.section import Section
from nvila.components.contracts.site import KEY, Quantity, Site

Text = Annotated[str, Field(min_length=1, max_length=253)]
Label = Annotated[str, Field(pattern=r"^[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?$")]
Name = Annotated[
    str, Field(pattern=r"^[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?(\.[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?)*$", max_length=253)
]
"""Of a Secret, which may have dots."""
HostNames = Annotated[list[Annotated[str, Field(min_length=1, max_length=253)]], Field(max_length=16)]
CAMEL = ConfigDict(alias_generator=to_camel, populate_by_name=True)
"""Names as Kubernetes has them."""


class Gateway(Section):
    """The Gateway that users come through; somebody else keeps it."""

    model_config = CAMEL

    name: Text
    """Of a Gateway of the Gateway API."""
    namespace: Label | None = None
    """Where it is; the ModelRollout's own namespace without."""
    section_name: Label | None = None
    """Its listener; all that take the route without."""


class Pods(Section):
    """The pods of each version."""

    model_config = CAMEL

    replicas: int = Field(default=1, ge=1, le=100)
    """Of each version."""
    gpus: int = Field(default=1, ge=0, le=16)
    """Of each pod; 0 serves on the CPU."""
    gpu_resource: Text = "nvidia.com/gpu"
    """Name under which the cluster counts GPUs."""
    cpu: Quantity = "8"
    """Cores of each pod, asked for; there is no limit."""
    memory: Quantity = "32Gi"
    """Memory of each pod, asked for and at most."""
    shared_memory: Quantity = "4Gi"
    """Most of the pod's `/dev/shm`, out of its memory."""
    node_selector: dict[str, str] = {}
    """Labels of the nodes."""
    tolerations: list[dict[str, Any]] = Field(default=[], max_length=64)
    """Taints of nodes that do not matter, as Kubernetes writes them."""
    affinity: dict[str, Any] = {}
    """Further wishes for nodes, as Kubernetes writes them."""
    priority_class_name: str = ""
    """Of the pods."""
    service_account_name: str = ""
    """Of the pods; they ask the API server nothing."""
    image_pull_secrets: list[Name] = Field(default=[], max_length=16)
    """Names of Secrets."""


class Serving(Section):
    """What a ModelRollout begins with that a run makes on this cluster; people change it there afterwards."""

    model_config = CAMEL

    image: Text
    """Of the serving pods: the platform's image `serve`."""
    gateway: Gateway
    """Where users come in."""
    hostnames: HostNames = []
    """Host names that users ask; all of the Gateway's without."""
    pods: Pods = Pods()
    """What a pod takes, and where it may run."""


def served_with(site: Site | None) -> Serving:
    """What a site says of it; `Site` itself, which every step reads, takes it as it is.

    Raises:
        ConfigError: it says nothing, or something that is none; names the field.
    """
    if site is None or site.serving is None:
        raise ConfigError(
            "this cluster does not say with which image and Gateway models are served",
            where=f"{KEY}: serving",
            do="Set the chart's controller.enabled and controller.gateway, or make the model's ModelRollout: a run "
            "takes it as it is.",
        )
    try:
        return Serving.model_validate(site.serving)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        field = ".".join(map(str, ("serving", *first["loc"])))
        raise ConfigError(first["msg"], where=f"{KEY}: {field}", value=first["input"]) from None
