"""Stands in for a Gateway API implementation: feeds one real Envoy from the HTTPRoutes and Services that are stored.

Host names, exact headers, weighted Services by their cluster IPs, and one more try where a request has reached nobody:
what common ones do. It polls; while the API server is away Envoy goes on with what it has. What changes lies in
files that are moved into place, a Service before the first route to it.

    python tests/night/translator.py FOLDER PORT      # of KUBECONFIG's cluster; Envoy ends with it
"""

from __future__ import annotations

import json
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from nvila.components.contracts.children import leashed
from nvila.components.contracts.environment import current
from nvila.components.contracts.files import digest_json, write_atomic
from nvila.components.kube.connect import connect
from nvila.components.kube.errors import ApiError
from nvila.components.kube.requests import MERGE, Patience, Requests
from nvila.components.serve.envoy import Admin
from nvila.components.serve.interpreter import envoy

API, POLL_SECONDS, ENVOY_SECONDS = "/apis/gateway.networking.k8s.io/v1", 0.2, 5.0
_HTTP = "type.googleapis.com/envoy.extensions.filters"
Object, Addresses = dict[str, Any], dict[tuple[str, str, int], str]


def resources(routes: list[Object], services: list[Object]) -> tuple[list[Object], list[Object]]:
    """Envoy's clusters and virtual hosts, of what is stored."""
    ports = [(one, port["port"]) for one in services for port in one["spec"].get("ports", [])]
    addresses = {(*_name(one), port): f"{one['spec']['clusterIP']}:{port}" for one, port in ports}
    hosts = sorted((_host(route, addresses) for route in routes), key=lambda host: str(host["name"]))
    actions = [route.get("route", {}) for host in hosts for route in host["routes"]]
    used = {one["name"] for action in actions for one in action.get("weighted_clusters", {}).get("clusters", [])}
    return [_cluster(name) for name in sorted(used)], hosts


def _name(one: Object) -> tuple[str, str]:
    return one["metadata"]["namespace"], one["metadata"]["name"]


def _host(route: Object, addresses: Addresses) -> Object:
    """Of one HTTPRoute; the rule with the most headers comes first, as the Gateway API has it."""
    (namespace, name), found = _name(route), []
    for rule in route["spec"].get("rules", []):
        action = _action(rule, namespace, addresses)
        for match in rule.get("matches") or [{}]:
            headers = [{"name": h["name"], "string_match": {"exact": h["value"]}} for h in match.get("headers", [])]
            found.append({"match": {"prefix": match.get("path", {}).get("value", "/"), "headers": headers}, **action})
    found.sort(key=lambda one: -len(one["match"]["headers"]))
    return {"name": f"{namespace}/{name}", "domains": route["spec"].get("hostnames") or ["*"], "routes": found}


def _action(rule: Object, namespace: str, addresses: Addresses) -> Object:
    """A Service that is not there gets its share all the same, as an error."""
    weights: dict[str, int] = {}
    for ref in rule.get("backendRefs", []):
        name = addresses.get((namespace, ref["name"], ref["port"]), "missing:1")
        weights[name] = weights.get(name, 0) + ref.get("weight", 1)
    weighted = [{"name": name, "weight": weight} for name, weight in sorted(weights.items()) if weight]
    if not weighted:
        return {"direct_response": {"status": 500}}
    longest = rule.get("timeouts", {}).get("request", "0s")
    again = {"retry_on": "connect-failure,reset-before-request", "num_retries": 1}
    return {"route": {"weighted_clusters": {"clusters": weighted}, "timeout": longest, "retry_policy": again}}


def _cluster(name: str) -> Object:
    address, _, port = name.partition(":")
    place = {"address": {"socket_address": {"address": address, "port_value": int(port)}}}
    endpoints = [] if address in ("None", "missing") else [{"lb_endpoints": [{"endpoint": place}]}]
    return {"name": name, "connect_timeout": "2s", "load_assignment": {"cluster_name": name, "endpoints": endpoints}}


def _bootstrap(folder: Path, port: int) -> Object:
    def from_file(name: str) -> Object:
        return {"path_config_source": {"path": str(folder / name), "watched_directory": {"path": str(folder)}}}

    manager = {
        "@type": f"{_HTTP}.network.http_connection_manager.v3.HttpConnectionManager",
        "stat_prefix": "gateway",
        "rds": {"route_config_name": "gateway", "config_source": from_file("routes.json")},
        "http_filters": [{"name": "router", "typed_config": {"@type": f"{_HTTP}.http.router.v3.Router"}}],
    }
    listener = {
        "address": {"socket_address": {"address": "127.0.0.1", "port_value": port}},
        "filter_chains": [{"filters": [{"name": "http", "typed_config": manager}]}],
    }
    return {
        "node": {"id": "gateway", "cluster": "gateway"},
        "admin": {"address": {"pipe": {"path": str(folder / "admin")}}},
        "dynamic_resources": {"cds_config": from_file("clusters.json")},
        "static_resources": {"listeners": [listener]},
    }


def _write(path: Path, kind: str, content: list[Object]) -> None:
    typed = [{"@type": f"type.googleapis.com/envoy.config.{kind}", **one} for one in content]
    text = json.dumps({"version_info": digest_json(typed)[:16], "resources": typed})
    if not path.exists() or path.read_text() != text:
        write_atomic(path, text)


def _apply(folder: Path, clusters: list[Object], hosts: list[Object], admin: Admin | None) -> None:
    _write(folder / "clusters.json", "cluster.v3.Cluster", clusters)
    deadline, names, known = time.monotonic() + ENVOY_SECONDS, {one["name"] for one in clusters}, set[str]()
    while admin and not names <= known and time.monotonic() < deadline:
        with suppress(OSError, ValueError):
            known = {one["name"] for one in admin.get("/clusters?format=json")["cluster_statuses"]}
    _write(folder / "routes.json", "route.v3.RouteConfiguration", [{"name": "gateway", "virtual_hosts": hosts}])


def _accept(requests: Requests, route: Object) -> None:
    """Say in its status that a route is served, once for each change of it."""
    told, generation = (route.get("status") or {}).get("parents", []), route["metadata"]["generation"]
    if not any(c["observedGeneration"] == generation for one in told for c in one["conditions"]):
        now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        said = {"status": "True", "message": "", "observedGeneration": generation, "lastTransitionTime": now}
        conditions = [{"type": kind, "reason": kind, **said} for kind in ("Accepted", "ResolvedRefs")]
        by = {"controllerName": "nvila.test/translator", "conditions": conditions}
        body = {"status": {"parents": [{"parentRef": ref, **by} for ref in route["spec"]["parentRefs"]]}}
        requests.ask("PATCH", "{}/namespaces/{}/httproutes/{}/status".format(API, *_name(route)), body=body, form=MERGE)


def main(folder: Path, port: int) -> None:
    """Until it, or its Envoy, is ended."""
    requests, process = Requests(connect(current().kubeconfig), Patience.once(5)), None
    known: dict[str, Object] = {}  # a cluster that was there once stays: a request may be on it
    while process is None or process.poll() is None:
        with suppress(ApiError):
            routes = requests.ask("GET", f"{API}/httproutes")["items"]
            clusters, hosts = resources(routes, requests.ask("GET", "/api/v1/services")["items"])
            known |= {one["name"]: one for one in clusters}
            _apply(folder, [known[name] for name in sorted(known)], hosts, process and Admin(str(folder / "admin")))
            if process is None:
                (folder / "bootstrap.json").write_text(json.dumps(_bootstrap(folder, port)))
                command = [str(envoy()), "--config-path", str(folder / "bootstrap.json"), "--disable-hot-restart"]
                process = leashed([*command, "--concurrency", "1", "--log-level", "warning"])
            for route in routes:
                _accept(requests, route)
        time.sleep(POLL_SECONDS)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
