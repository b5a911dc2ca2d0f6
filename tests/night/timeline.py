"""What the API server had stored of a served model at every moment, for judging answers and measuring times."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, field
from typing import Any

from nvila.components.contracts.modelrollout import API, MODEL_LABEL, PIN_HEADER, PLURAL, VERSION_LABEL
from nvila.components.kube.errors import ApiError, NotThere
from nvila.components.kube.requests import Requests

LAG_SECONDS = 3.0
"""How long a Gateway may take to do as is stored."""
LOOK_SECONDS = 0.2


@dataclass(frozen=True)
class Look:
    """One look; versions are numbers, as text."""

    at: float
    """As of `time.monotonic`."""
    weights: dict[str, int] = field(default_factory=dict)
    """Per cent of the requests by version, as the HTTPRoute has it."""
    pinned: frozenset[str] = frozenset()
    """Versions that a header reaches."""
    champion: str = ""
    """That the Service of the champion selects."""
    deployments: frozenset[str] = frozenset()
    pods: frozenset[str] = frozenset()
    """Versions with any; those on their way out count as gone."""
    status: dict[str, Any] = field(default_factory=dict)

    @property
    def serves(self) -> frozenset[str]:
        """Versions that may answer a request without a header: of the second try, too."""
        return frozenset(self.weights) | {self.champion}

    def serves_alone(self, version: str) -> bool:
        """Whether it does, with nobody beside it."""
        return self.weights == {version: 100} and self.status.get("phase") == "Serving"

    @property
    def state(self) -> tuple[Any, ...]:
        """What a kill point waits for a change of."""
        told = self.status
        pending, decisions = bool(told.get("pending")), [one["at"] for one in told.get("decisions", [])]
        return told.get("phase"), told.get("step"), pending, str(decisions), str(self.weights)


class Timeline:
    """Of one ModelRollout: a thread looks again and again. While the API server is away there are no looks."""

    def __init__(self, requests: Requests, namespace: str, name: str) -> None:
        self.looks: list[Look] = []
        self._requests, self._namespace, self._name = requests, namespace, name
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """No look comes after this."""
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._over.wait(LOOK_SECONDS):
            try:
                self.looks.append(self.look())
            except ApiError:
                continue

    @property
    def last(self) -> Look:
        """The last look."""
        return self.looks[-1] if self.looks else Look(0.0)

    def first(self, when: Any, since: float = 0.0) -> float | None:
        """When something was seen first after a moment; None: never."""
        return next((look.at for look in self.looks if look.at >= since and when(look)), None)

    def between(self, began: float, ended: float) -> list[Look]:
        """The looks of that time, those before it that a Gateway may still have acted on, and the next one: what
        changes between two looks, or while the API server is away, is seen late."""
        within = [look for look in self.looks if began - LAG_SECONDS <= look.at <= ended]
        before = [look for look in self.looks if look.at < began - LAG_SECONDS][-1:]
        return before + within + [look for look in self.looks if look.at > ended][:1]

    def look(self) -> Look:
        """What is stored now.

        Raises:
            ApiError: the API server does not answer.
        """
        at, labels = time.monotonic(), {"labelSelector": f"{MODEL_LABEL}={self._name}"}
        status = self._one(f"/apis/{API}", PLURAL, self._name).get("status", {})
        champion = self._one("/api/v1", "services", f"{self._name}-champion")
        selected = champion.get("spec", {}).get("selector", {}).get(VERSION_LABEL, "")
        deployments, pods = (
            self._all(*kind, labels) for kind in (("/apis/apps/v1", "deployments"), ("/api/v1", "pods"))
        )
        rules = (
            self._one("/apis/gateway.networking.k8s.io/v1", "httproutes", self._name).get("spec", {}).get("rules", [])
        )
        named = f"{self._name}-v"
        weights, pinned = {}, set()
        for rule in rules:
            headers = [h for match in rule.get("matches", []) for h in match.get("headers", [])]
            pinned |= {h["value"] for h in headers if h["name"].lower() == PIN_HEADER}
            for ref in rule.get("backendRefs", []) if not headers else []:
                version = ref["name"].removeprefix(named) if ref["name"].startswith(named) else selected
                weights[version] = weights.get(version, 0) + ref.get("weight", 1)
        return Look(
            at,
            {version: weight for version, weight in weights.items() if weight},
            frozenset(pinned),
            selected,
            _versions(deployments),
            _versions(pods),
            status,
        )

    def _one(self, api: str, plural: str, name: str) -> dict[str, Any]:
        try:
            return self._requests.ask("GET", f"{api}/namespaces/{self._namespace}/{plural}/{name}")
        except NotThere:
            return {}

    def _all(self, api: str, plural: str, query: dict[str, str]) -> list[dict[str, Any]]:
        """Those that are not on their way out."""
        found = self._requests.ask("GET", f"{api}/namespaces/{self._namespace}/{plural}", query=query)["items"]
        return [one for one in found if not one["metadata"].get("deletionTimestamp")]


def _versions(objects: list[dict[str, Any]]) -> frozenset[str]:
    return frozenset(one["metadata"]["labels"][VERSION_LABEL] for one in objects)
