"""Looks at what is there in a namespace: ModelRollouts, and what serves their models. One list request per kind."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from nvila.components.contracts.modelrollout import MODEL_LABEL, VERSION_LABEL
from nvila.components.kube.cluster import POD, Cluster, Kind, Object
from nvila.components.kube.errors import NotServed
from nvila.infra.controller.objects import DEPLOYMENT, MODEL_ROLLOUT, ROUTE, SERVICE, label_of
from nvila.infra.controller.reasons import pod_of, shown, unmade
from nvila.infra.controller.seen import Pod, Running
from nvila.infra.launch.job import conditions, said


@dataclass(frozen=True)
class Looked:
    """A namespace at one moment."""

    rollouts: tuple[Object, ...] = ()
    """The ModelRollouts, as the API server gives them."""
    objects: Mapping[tuple[Kind, str], Object] = field(default_factory=dict)
    """Deployments, Services and HTTPRoutes of ours, by kind and name."""
    owned: Mapping[str, Sequence[tuple[Kind, Object]]] = field(default_factory=dict)
    """The same by the ModelRollout's label."""
    pods: Mapping[tuple[str, str], tuple[Pod, ...]] = field(default_factory=dict)
    """By the ModelRollout's label and the version; none that is being deleted. Those that have failed come last."""
    missing: str = ""
    """What the cluster does not serve."""

    def get(self, kind: Kind, name: str) -> Object | None:
        """The object of this name, where it is there and labelled as ours."""
        return self.objects.get((kind, name))

    def of(self, name: str) -> Sequence[tuple[Kind, Object]]:
        """All that is there of the ModelRollout of this name, but pods; what is not wanted any more among it."""
        return self.owned.get(label_of(name), ())

    def running(self, name: str, version: str) -> Running:
        """The pods of a version of the ModelRollout of this name; not asked yet what they have counted."""
        pods = self.pods.get((label_of(name), version), ())
        for kind, found in self.of(name):
            if kind == DEPLOYMENT and _label(found, VERSION_LABEL) == version:
                return Running(pods, found["spec"]["replicas"], unmade(found))
        return Running(pods)

    def refused(self, name: str) -> str:
        """Why users do not come through: what a Gateway says against the route; empty where none says anything."""
        if self.missing or not (route := self.get(ROUTE, name)):
            return self.missing
        for parent in (route.get("status") or {}).get("parents") or ():
            for one in conditions({"status": parent}):
                if one["type"] in ("Accepted", "ResolvedRefs") and one["status"] == "False":
                    return f"the Gateway does not take the HTTPRoute {name}: {one.get('reason')}: {shown(said(one))}"
        return ""

    def routed(self, name: str) -> bool:
        """Whether every Gateway that says anything of the route has taken it up as it is now."""
        route = self.get(ROUTE, name) or {"metadata": {}}
        parents = (route.get("status") or {}).get("parents") or ()
        taken = [one.get("observedGeneration", 0) for parent in parents for one in conditions({"status": parent})]
        return all(one >= route["metadata"].get("generation", 0) for one in taken)


class Watch:
    """Of one namespace."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster

    def look(self) -> Looked:
        """What is there now.

        Raises:
            ApiError: one of its kinds; the cluster is away, say, or has no ModelRollouts.
        """
        rollouts = self._cluster.find(MODEL_ROLLOUT)
        objects, missing = dict[tuple[Kind, str], Object](), ""
        owned = defaultdict[str, list[tuple[Kind, Object]]](list)
        for kind in (DEPLOYMENT, SERVICE, ROUTE):
            try:
                found = self._cluster.find(kind, labels=MODEL_LABEL)
            except NotServed:
                if kind != ROUTE:
                    raise
                missing = f"the cluster does not serve {ROUTE.name} of {ROUTE.version}: install the Gateway API"
                continue
            for one in found:
                objects[kind, one["metadata"]["name"]] = one
                owned[_label(one, MODEL_LABEL)].append((kind, one))
        pods = dict[tuple[str, str], list[Pod]]()
        there = [
            one for one in self._cluster.find(POD, labels=MODEL_LABEL) if "deletionTimestamp" not in one["metadata"]
        ]
        for one in sorted(there, key=lambda one: (one.get("status") or {}).get("phase") == "Failed"):
            pods.setdefault((_label(one, MODEL_LABEL), _label(one, VERSION_LABEL)), []).append(pod_of(one))
        return Looked(tuple(rollouts), objects, owned, {key: tuple(some) for key, some in pods.items()}, missing)


def _label(found: Object, name: str) -> str:
    return str((found["metadata"].get("labels") or {}).get(name, ""))
