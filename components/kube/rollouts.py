"""The ModelRollouts of a namespace: found by name or by model, made where there is none, read, and overridden."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from typing import Any

from pydantic import ValidationError

from nvila.components.contracts import site
from nvila.components.contracts.environment import Environment
from nvila.components.contracts.errors import ConfigError
from nvila.components.contracts.modelrollout import API, KIND, PLURAL, Override, Spec, Status
from nvila.components.contracts.serving import Serving, served_with
from nvila.components.contracts.site import Site
from nvila.components.kube.cluster import CONFIG_MAP, Cluster, Kind, Object
from nvila.components.kube.errors import Conflict, Denied
from nvila.components.kube.requests import Advice

MODEL_ROLLOUT = Kind(API, KIND, PLURAL)
ADVICE = Advice(
    right="Ask whoever keeps the cluster for the right; a run's pods have it by the chart's Role nvila-rollout.",
    kind="The cluster serves no models: install the platform's chart with controller.enabled.",
)
_LONGEST_NAME = 40
"""Of one that is made here; a digest may follow, and the names of what is made for it have more behind it."""


@dataclass(frozen=True)
class ModelRollout:
    """One at one moment."""

    name: str
    generation: int
    """Grows with every change of the spec."""
    said: Mapping[str, Any]
    """The spec as it is stored; another version of the platform may have written it."""
    status: Status

    @classmethod
    def of(cls, found: Object) -> ModelRollout:
        """As the API server gives it."""
        metadata, status = found["metadata"], Status.model_validate(found.get("status") or {})
        return cls(metadata["name"], int(metadata.get("generation", 0)), found.get("spec") or {}, status)

    @property
    def model(self) -> str:
        """The registered model."""
        return str(self.said.get("model", ""))

    @cached_property
    def spec(self) -> Spec:
        """What people decided.

        Raises:
            ConfigError: names the field that is wrong.
        """
        try:
            return Spec.model_validate(self.said)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            where = ".".join(map(str, (f"modelrollout/{self.name}: spec", *first["loc"])))
            raise ConfigError(first["msg"], where=where, value=first["input"]) from None


class Rollouts:
    """Those of one namespace."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self.namespace = cluster.namespace

    def all(self) -> list[ModelRollout]:
        """By name."""
        found = map(ModelRollout.of, self._cluster.find(MODEL_ROLLOUT))
        return sorted(found, key=lambda one: one.name)

    def get(self, name: str) -> ModelRollout | None:
        """The one of this name."""
        found = self._cluster.get(MODEL_ROLLOUT, name)
        return ModelRollout.of(found) if found else None

    def of_model(self, model: str) -> ModelRollout | None:
        """The one that serves a registered model, however people called it.

        Raises:
            ConfigError: there are several.
        """
        found = [one for one in self.all() if one.model == model]
        if len(found) > 1:
            raise ConfigError(
                f"several ModelRollouts of namespace {self.namespace} serve the model {model}",
                where="modelrollout",
                value=[one.name for one in found],
                do="Keep the one that users reach, and delete the others.",
            )
        return found[0] if found else None

    def called(self, name: str) -> ModelRollout:
        """The one of this name, or of this model.

        Raises:
            ConfigError: there is none, or several serve the model.
        """
        if found := self.get(name) if re.fullmatch("[a-z0-9][a-z0-9.-]*", name) else None:
            return found
        if found := self.of_model(name):
            return found
        known = ", ".join(one.name for one in self.all()) or "none"
        raise ConfigError(
            f"namespace {self.namespace} has no such ModelRollout",
            where="NAME",
            value=name,
            do=f"There are: {known}. Another namespace is named with --namespace.",
        )

    def make(self, model: str, spec: Spec) -> ModelRollout:
        """One for a model that has none; where another run is quicker, that run's.

        Raises:
            ConfigError: there are several, or one of another model has its name.
        """
        name, wanted = name_for(model), spec.model_dump(mode="json", by_alias=True, exclude_defaults=True)
        try:
            return ModelRollout.of(self._cluster.create(MODEL_ROLLOUT, {"metadata": {"name": name}, "spec": wanted}))
        except Conflict:
            if found := self.of_model(model):
                return found
            raise ConfigError(
                f"a ModelRollout of this name serves another model than {model}",
                where=f"modelrollout/{name}",
                do="Make one for this model under another name; a run takes it.",
            ) from None

    def override(self, name: str, override: Override) -> None:
        """Have a version served now, without steps."""
        wanted = override.model_dump(mode="json", by_alias=True)
        self._cluster.patch(MODEL_ROLLOUT, name, {"spec": {"override": wanted}})


def name_for(model: str) -> str:
    """The name of the ModelRollout that a run makes: the model's own where Kubernetes takes it."""
    name = re.sub("[^a-z0-9]+", "-", model.lower()).strip("-")[:_LONGEST_NAME].strip("-")
    name = name if name[:1].isalpha() else f"model-{name}".strip("-")
    return name if name == model else f"{name}-{sha256(model.encode()).hexdigest()[:6]}"


def site_settings(cluster: Cluster) -> Mapping[str, str]:
    """Data of the site's ConfigMap, which may be missing, or not be this account's to read."""
    try:
        return (cluster.get(CONFIG_MAP, site.CONFIG_MAP) or {}).get("data") or {}
    except Denied:
        return {}


def serving_of(cluster: Cluster, here: Environment) -> Serving:
    """What models are served with on this cluster, by the variables of a step's pod or by the site's ConfigMap.

    Raises:
        ConfigError: it does not say.
    """
    return served_with(here.site or Site.read(site_settings(cluster)))
