"""Which request goes to which server: Envoy's routes, as a pure function of the servers' roles and versions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from nvila.components.contracts.modelrollout import PIN_HEADER
from nvila.components.contracts.recipe.endpoint import EndpointSettings

TRIED = "tried "
"""Before the names of two servers: a request that the first fails to answer goes to the second."""
PROBED = "probed "
"""Before the name of a server that gets probes: they are counted apart, as no requests of users."""
LAST_HEADER = "x-nvila-last-try"
"""On what goes the way to another endpoint: there it gets no further try elsewhere, or two would send it round."""

_AGAIN = ("connect-failure", "refused-stream", "reset-before-request")
"""Tried again on the same server: it has seen nothing of the request."""
_AGAIN_ELSEWHERE = (*_AGAIN, "reset", "retriable-status-codes")
"""Tried once more on the other one: it failed."""


@dataclass(frozen=True)
class Ways:
    """Who gets which requests; a server is named by its `address:port`."""

    champion: str | None = None
    """Gets what the challenger does not; without one, requests are told to come again."""
    challenger: str | None = None
    """The one that is tried; what it fails to answer the champion is asked."""
    weight: int = 0
    """Per cent of the requests that it gets."""
    versions: Mapping[str, str | None] = field(default_factory=dict)
    """The server of each version that is to be served; None while that is not ready. Who asks for a version by
    `PIN_HEADER` reaches its server and no other."""
    fallback: str | None = None
    """`host:port` of another endpoint, found by DNS: it is asked what a champion without challenger fails to answer,
    and everything while there is no champion."""

    @property
    def pair(self) -> tuple[str, str] | None:
        """The server that is tried, and the other one."""
        if self.challenger and self.champion:
            return self.challenger, self.champion
        return (self.champion, self.fallback) if self.champion and self.fallback and not self.challenger else None


def tried(first: str, second: str) -> str:
    """Name of the cluster of two servers."""
    return f"{TRIED}{first} {second}"


def probed(server: str) -> str:
    """Name of the cluster by which a server gets probes."""
    return f"{PROBED}{server}"


def routes(settings: EndpointSettings, ways: Ways) -> dict[str, Any]:
    """Envoy's route configuration.

    A version that is named gets its requests; probes ask the champion; of all else the challenger gets its share, and
    the champion, or the fallback, or an error, the rest.
    """
    made = [*_pinned(settings, ways)]
    champion = _to(ways.champion, settings)
    probes = _to(probed(ways.champion) if ways.champion else None, settings)
    made += [{"match": {"path": path}, **probes} for path in ("/health", "/ping", "/metrics")]
    if ways.challenger and ways.weight:
        share = {"default_value": {"numerator": ways.weight, "denominator": "HUNDRED"}, "runtime_key": "challenger"}
        target = tried(*ways.pair) if ways.pair else ways.challenger
        made.append({"match": _all(runtime_fraction=share), **_to(target, settings, _AGAIN_ELSEWHERE)})
    if ways.fallback and not ways.challenger:
        made.append({"match": _all(headers=[{"name": LAST_HEADER, "present_match": True}]), **champion})
        target = tried(*ways.pair) if ways.pair else ways.fallback
        last = {"header": {"key": LAST_HEADER, "value": "1"}}
        made.append({"match": _all(), **_to(target, settings, _AGAIN_ELSEWHERE), "request_headers_to_add": [last]})
    else:
        made.append({"match": _all(), **champion})
    return {
        "name": "endpoint",
        "virtual_hosts": [{"name": "endpoint", "domains": ["*"], "routes": made}],
        "request_headers_to_remove": ["x-envoy-internal"],
        "response_headers_to_remove": ["server", "x-powered-by"],
    }


def _pinned(settings: EndpointSettings, ways: Ways) -> list[dict[str, Any]]:
    """Of each version, and of every other that somebody names."""
    named = [
        {"match": _all(headers=[{"name": PIN_HEADER, "string_match": {"exact": version}}]), **_to(server, settings)}
        for version, server in ways.versions.items()
    ]
    other = _all(headers=[{"name": PIN_HEADER, "present_match": True}])
    return [*named, {"match": other, "direct_response": {"status": 404}}]


def _all(**only: Any) -> dict[str, Any]:
    return {"prefix": "/", **only}


def _to(cluster: str | None, settings: EndpointSettings, again: Sequence[str] = _AGAIN) -> dict[str, Any]:
    """The way to a cluster, or the answer where there is none."""
    if cluster is None:
        return {"direct_response": {"status": 503}}
    other = {
        "name": "the other one",
        "typed_config": {
            "@type": "type.googleapis.com/envoy.extensions.retry.priority.previous_priorities.v3."
            "PreviousPrioritiesConfig",
            "update_frequency": 1,
        },
    }
    return {
        "route": {
            "cluster": cluster,
            "timeout": f"{settings.request_seconds}s",
            "retry_policy": {
                "retry_on": ",".join(again),
                "retriable_status_codes": [500, 502, 503, 504],
                "num_retries": 1,
                "retry_back_off": {"base_interval": "0.05s"},
                "retry_priority": other,
            },
        }
    }
