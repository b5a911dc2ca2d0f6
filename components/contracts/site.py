"""How a cluster is set up: one JSON value, the key `NVILA_SITE` of the chart's ConfigMap `nvila-site`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from nvila.components.contracts.errors import ConfigError

KEY = "NVILA_SITE"
CONFIG_MAP = "nvila-site"
"""In the namespace of a run."""
Quantity = Annotated[str, Field(pattern=r"^\d+(\.\d+)?(m|[kMGTP]|[KMGTP]i|)$")]
"""As Kubernetes writes it, such as `500m` or `1200Gi`."""


class Site(BaseModel):
    """What pods and training jobs of a cluster are made of, and who makes the jobs."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    launcher: str = ""
    """Dotted name of the module that does heavy work as training jobs; empty: every step works in its own process."""
    training_runtime: str = "nvila-torch"
    """The ClusterTrainingRuntime that jobs are made from."""
    gpus_per_node: Annotated[int, Field(ge=0)] = 8
    """GPUs of a node; 0 asks for none and runs processes on the CPU."""
    gpu_resource: str = "nvidia.com/gpu"
    """Name under which the cluster counts GPUs."""
    node_cpu: Quantity = "96"
    """Cores of a whole node of the runtime; smaller jobs get a share of them and of the memory."""
    node_memory: Quantity = "1200Gi"
    """Memory of a whole node."""
    gpu_labels: dict[str, str] = {}
    """Labels of the nodes with GPUs; pods that take GPUs go there only."""
    tolerations: tuple[dict[str, Any], ...] = ()
    """Of those pods, for the taints of such nodes."""
    cpu_labels: dict[str, str] = {}
    """Labels of the nodes for pods of a run that take no GPUs, but for its first and last step."""
    cpu_tolerations: tuple[dict[str, Any], ...] = ()
    """Of those pods, for the taints of such nodes."""
    environment: dict[str, str] = {}
    """Variables for the steps and all that they start, such as a proxy; what a pod has already stays."""
    queue: str = ""
    """Kueue's LocalQueue; empty leaves Kueue out."""
    serving: dict[str, Any] | None = None
    """What models are served with here, in the form of a ModelRollout's `spec`: `image`, `gateway` {`name`,
    `namespace`, `sectionName`}, `hostnames`, `pods`; none: no model is served on this cluster."""

    @classmethod
    def read(cls, variables: Mapping[str, str]) -> Site | None:
        """The site that variables, or the data of the ConfigMap, describe; None where they describe none.

        Raises:
            ConfigError: names the key that is wrong.
        """
        text, old = variables.get(KEY, ""), cls.notice(variables)
        if not text and not old:
            return None
        try:
            if not old:
                return cls.model_validate_json(text)
            single = {field: variables[name] for name, field in OLD_KEYS.items() if variables.get(name)}
            return cls.model_validate({"launcher": text, **single})
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            field = ".".join(map(str, first["loc"]))
            where = f"NVILA_{field.upper()}" if old else f"{KEY}: {field}".removesuffix(": ")
            raise ConfigError(first["msg"], where=where, value=first["input"]) from None

    @classmethod
    def notice(cls, variables: Mapping[str, str]) -> str | None:
        """What to say where the variables have the form that is read for one release only."""
        text = variables.get(KEY, "")
        if text.lstrip().startswith("{") or not (text or any(variables.get(name) for name in OLD_KEYS)):
            return None
        return f"{KEY}: of the old form, which the next release does not read; upgrade the chart"

    def share(self, processes: int) -> tuple[int, int]:
        """Nodes, and processes on each, for so many processes; a process stands for a GPU.

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


_NEW = {"launcher", "gpu_labels", "tolerations", "cpu_labels", "cpu_tolerations", "environment", "serving"}
OLD_KEYS = {f"NVILA_{field.upper()}": field for field in Site.model_fields if field not in _NEW}
"""The old form, read for one release: a key for each old field, and the launcher's bare name as `NVILA_SITE`."""
