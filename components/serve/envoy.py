"""Envoy in front of the servers: bytes only. TLS, limits of connections, headers and bodies, weights, one more try.

Pure functions make its configuration of what is wanted and of the servers' addresses; `Admin` asks it how it goes. What
may change while it runs lies in files that are moved into place, so that no connection is lost over a change. The
supervisor starts it; what stands in a body is the middleware's business (`guard`).
"""

from __future__ import annotations

import http.client
import json
import os
import socket
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from nvila.components.contracts.addresses import host_and_port
from nvila.components.contracts.files import digest_json
from nvila.components.contracts.modelrollout import PIN_HEADER
from nvila.components.contracts.recipe.endpoint import EndpointSettings
from nvila.components.serve.routes import TRIED, Ways, probed, routes, tried

HEADER_SECONDS, BODY_SECONDS, IDLE_SECONDS = 10, 120, 60
"""How long a client may take for its headers (and TLS's greeting), for a whole request, and between two requests."""
GATEWAY_IDLE_SECONDS = 3660
"""In place of `IDLE_SECONDS` behind a Gateway, which keeps a connection for an hour where it is an Envoy: a request
that it sends when this end has just closed is lost."""
HELD_SECONDS = HEADER_SECONDS + BODY_SECONDS
"""How long a request may hold on to the way that it was given when its headers had come."""
CONNECT_SECONDS = 2
HEADERS_KIB, HEADERS = 60, 100
"""Most of a request."""
RETRY_AFTER_SECONDS = 5
_MEMORY_BYTES = 2**31
"""Most that bodies in hand may take; the largest requests are ended on the way there."""
_DRAIN_SECONDS = 600

_HTTP = "type.googleapis.com/envoy.extensions"
_FORGED = (
    *("forwarded", "x-forwarded-for", "x-forwarded-host", "x-forwarded-port", "x-forwarded-proto", "x-real-ip"),
    "x-request-id",
)
"""What a client may not say about itself and its request; Envoy adds what it sees."""
_REASONS = {
    400: ("invalid_request_error", "this is no request that is understood here"),
    403: ("invalid_request_error", "protocols other than HTTP are not spoken here"),
    404: ("invalid_request_error", "there is nothing here"),
    408: ("timeout_error", "the request did not arrive in time"),
    413: ("invalid_request_error", "the body is larger than {max_body_mib} MiB"),
    426: ("invalid_request_error", "HTTP/1.1 is spoken here"),
    431: ("invalid_request_error", f"more than {HEADERS} headers, or more than {HEADERS_KIB} KiB of them"),
    502: ("server_error", "the model's server broke the connection; try again"),
    503: ("server_error", "no server of the model is ready; try again"),
    504: ("timeout_error", "the answer took longer than {request_seconds:.0f} seconds"),
}
"""Errors that Envoy itself answers with: OpenAI's `type`, and a message of ours."""


def arguments(binary: Path, folder: Path) -> list[str]:
    """The command line; `folder` has the files of `files`."""
    return [
        *(str(binary), "--config-path", str(folder / "bootstrap.json"), "--disable-hot-restart"),
        *(
            "--concurrency",
            str(min(4, max(1, (os.cpu_count() or 1) // 4))),
            "--log-level",
            "warning",
            "--drain-strategy",
            "immediate",
        ),
        *("--drain-time-s", str(_DRAIN_SECONDS)),
    ]


def files(
    folder: Path,
    address: str,
    port: int,
    settings: EndpointSettings,
    servers: Iterable[str],
    ways: Ways,
    idle_seconds: int = IDLE_SECONDS,
) -> dict[str, dict[str, Any]]:
    """Contents by file name, in the order in which a new server comes into use.

    Args:
        folder: private one of this Envoy's, with a short name: the socket of its admin interface lies there.
        address: to listen on, as a number.
        port: to listen on.
        settings: the endpoint's limits.
        servers: `address:port` of every server that runs, those included whose last answers are awaited, and of those
            that have ended within `HELD_SECONDS`: the way to such a one leads on to the other.
        ways: which of them gets which requests.
        idle_seconds: how long a connection stays between two requests; not to be changed while Envoy runs.
    """
    clusters = [_cluster(server, settings) for server in sorted(set(servers))]
    if ways.champion:
        clusters.append(_cluster(ways.champion, settings) | {"name": probed(ways.champion)})
    if ways.fallback:
        clusters.append(_elsewhere(ways.fallback, settings))
    if pair := ways.pair:
        clusters.append(_either(*pair, settings))
    made = {
        "bootstrap.json": _bootstrap(folder, settings),
        "certificate.json": _resources("tls.Secret", [_certificate(folder)]) if settings.certificate else {},
        "clusters.json": _resources("cluster.Cluster", clusters, "config"),
        "routes.json": _resources("route.RouteConfiguration", [routes(settings, ways)], "config"),
        "listeners.json": _resources(
            "listener.Listener", [_listener(folder, address, port, settings, idle_seconds)], "config"
        ),
    }
    return {name: content for name, content in made.items() if content}


def apply(folder: Path, contents: dict[str, dict[str, Any]], admin: Admin | None, seconds: float = 5.0) -> bool:
    """Have the files say this, and Envoy, where it runs, do it; no request meets a route to a server that it does not
    know. Returns whether it has done so within these seconds.

    Raises:
        OSError: it does not answer.
    """
    known = {one["name"]: one for one in _read(folder / "clusters.json").get("resources", [])}
    wanted = {one["name"]: one for one in contents["clusters.json"]["resources"]}
    # A request that is still being received, or waits for its second try, holds on to its route: a pair stays as long
    # as both of it do.
    pairs = {name: one for name, one in known.items() if name.startswith(TRIED) and set(name.split()[1:]) <= {*wanted}}
    first, last = {**known, **wanted}, {**pairs, **wanted}
    for clusters in (first, last):
        # In one order: Envoy does not note the version of a change that changes nothing.
        ordered = [clusters[name] for name in sorted(clusters)]
        contents = contents | {"clusters.json": _resources("cluster.Cluster", ordered, "config")}
        for names in (["clusters.json"], [*contents]):
            for name in names:
                _write(folder / name, contents[name])
            if admin and not _within(seconds, lambda: _holds(admin, contents, names)):  # noqa: B023
                return False
    return True


def _write(path: Path, content: dict[str, Any]) -> None:
    """By rename, and only where it says something else; Envoy takes notice of it."""
    if _read(path) != content:
        partial = path.with_name(f".{path.name}")
        partial.write_text(json.dumps(content), encoding="utf-8")
        partial.replace(path)


def _read(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else {}


def _within(seconds: float, there: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + seconds
    while not (done := there()) and time.monotonic() < deadline:
        time.sleep(0.02)
    return done


def link_certificate(folder: Path, settings: EndpointSettings) -> None:
    """Have Envoy read the user's certificate and key anew where one of them is another than before, however changed."""
    links = {"certificate": settings.certificate, "key": settings.certificate_key}
    states = [(path, Path(path).stat()) for path in links.values() if path]
    known = json.dumps([(path, state.st_ino, state.st_size, state.st_mtime_ns) for path, state in states])
    noted = folder / "tls" / "noted"
    if not states or (noted.exists() and noted.read_text(encoding="utf-8") == known):
        return
    noted.parent.mkdir(exist_ok=True)
    for name, path in links.items():
        partial = noted.parent / f".{name}"
        partial.unlink(missing_ok=True)
        partial.symlink_to(str(path))
        partial.replace(noted.parent / name)
    noted.write_text(known, encoding="utf-8")


def _holds(admin: Admin, contents: dict[str, dict[str, Any]], names: Iterable[str]) -> bool:
    """Whether Envoy has taken up what these files say, and listens where they say so."""
    dump = {one["@type"].rpartition(".")[2]: one for one in admin.get("/config_dump")["configs"]}
    listeners = dump["ListenersConfigDump"].get("dynamic_listeners", [])
    held = {
        "clusters.json": [dump["ClustersConfigDump"].get("version_info")],
        "routes.json": [one.get("version_info") for one in dump["RoutesConfigDump"].get("dynamic_route_configs", [])],
        "listeners.json": [one.get("active_state", {}).get("version_info") for one in listeners],
    }
    return all(held[name] == [contents[name]["version_info"]] for name in names if name in held)


def _bootstrap(folder: Path, settings: EndpointSettings) -> dict[str, Any]:
    most = max(_MEMORY_BYTES, 4 * settings.max_body_mib * 2**20)
    heap = "envoy.resource_monitors.fixed_heap"
    actions = [("stop_accepting_requests", {"threshold": {"value": 0.95}})]
    actions.append(("reset_high_memory_stream", {"scaled": {"scaling_threshold": 0.8, "saturation_threshold": 0.95}}))
    return {
        "node": {"id": "endpoint", "cluster": "nvila"},
        "admin": {"address": {"pipe": {"path": str(folder / "admin"), "mode": 0o600}}},
        "dynamic_resources": {
            "lds_config": _from_file(folder, "listeners.json"),
            "cds_config": _from_file(folder, "clusters.json"),
        },
        "overload_manager": {
            "refresh_interval": "0.25s",
            "buffer_factory_config": {"minimum_account_to_track_power_of_two": 20},
            "resource_monitors": [
                {
                    "name": heap,
                    "typed_config": {
                        "@type": f"{_HTTP}.resource_monitors.fixed_heap.v3.FixedHeapConfig",
                        "max_heap_size_bytes": most,
                    },
                }
            ],
            "actions": [
                {"name": f"envoy.overload_actions.{name}", "triggers": [{"name": heap, **trigger}]}
                for name, trigger in actions
            ],
        },
    }


def _listener(folder: Path, address: str, port: int, settings: EndpointSettings, idle_seconds: int) -> dict[str, Any]:
    limit = {
        "name": "connections",
        "typed_config": {
            "@type": f"{_HTTP}.filters.network.connection_limit.v3.ConnectionLimit",
            "stat_prefix": "endpoint",
            "max_connections": settings.max_connections,
        },
    }
    manager = {"name": "http", "typed_config": _manager(folder, settings, idle_seconds)}
    chain: dict[str, Any] = {"filters": [limit, manager], "transport_socket_connect_timeout": f"{HEADER_SECONDS}s"}
    if settings.certificate:
        chain["transport_socket"] = {
            "name": "tls",
            "typed_config": {
                "@type": f"{_HTTP}.transport_sockets.tls.v3.DownstreamTlsContext",
                "common_tls_context": {
                    "tls_params": {"tls_minimum_protocol_version": "TLSv1_2"},
                    "alpn_protocols": ["http/1.1"],
                    "tls_certificate_sds_secret_configs": [
                        {"name": "endpoint", "sds_config": _from_file(folder, "certificate.json")}
                    ],
                },
            },
        }
    # SO_KEEPALIVE, TCP_KEEPIDLE, TCP_KEEPINTVL, TCP_KEEPCNT: a client whose machine is gone is noticed in two minutes.
    alive = [(socket.SOL_SOCKET, 9, 1), (socket.IPPROTO_TCP, 4, 60), (socket.IPPROTO_TCP, 5, 15), (6, 6, 4)]
    return {
        "name": "endpoint",
        "address": {"socket_address": {"address": address, "port_value": port, "ipv4_compat": address == "::"}},
        "enable_reuse_port": False,  # or another program could listen there too, and have a part of the requests
        "per_connection_buffer_limit_bytes": 2**18,
        "socket_options": [{"level": level, "name": name, "int_value": value} for level, name, value in alive],
        "filter_chains": [chain],
    }


def _manager(folder: Path, settings: EndpointSettings, idle_seconds: int) -> dict[str, Any]:
    """Of HTTP: strict, and it believes a client nothing about where its request comes from."""
    return {
        "@type": f"{_HTTP}.filters.network.http_connection_manager.v3.HttpConnectionManager",
        "stat_prefix": "endpoint",
        "codec_type": "HTTP1",
        "rds": {"route_config_name": "endpoint", "config_source": _from_file(folder, "routes.json")},
        "http_filters": [
            {
                "name": "body",  # whole before it is sent on, so that it can be sent once more
                "typed_config": {
                    "@type": f"{_HTTP}.filters.http.buffer.v3.Buffer",
                    "max_request_bytes": settings.max_body_mib * 2**20,
                },
            },
            {
                "name": "router",
                "typed_config": {
                    "@type": f"{_HTTP}.filters.http.router.v3.Router",
                    "suppress_envoy_headers": True,
                },
            },
        ],
        "use_remote_address": True,
        "internal_address_config": {"unix_sockets": False, "cidr_ranges": []},
        "early_header_mutation_extensions": [
            {
                "name": "forged",
                "typed_config": {
                    "@type": f"{_HTTP}.http.early_header_mutation.header_mutation.v3.HeaderMutation",
                    "mutations": [
                        *({"remove": name} for name in _FORGED),
                        {"remove_on_match": {"key_matcher": {"prefix": "x-envoy-"}}},
                    ],
                },
            }
        ],
        "server_header_transformation": "PASS_THROUGH",
        "normalize_path": True,
        "path_with_escaped_slashes_action": "REJECT_REQUEST",
        "max_request_headers_kb": HEADERS_KIB,
        "request_headers_timeout": f"{HEADER_SECONDS}s",
        "request_timeout": f"{min(BODY_SECONDS, settings.request_seconds)}s",
        "stream_idle_timeout": f"{settings.request_seconds}s",
        "common_http_protocol_options": {
            "idle_timeout": f"{idle_seconds}s",
            "max_headers_count": HEADERS,
            "headers_with_underscores_action": "REJECT_REQUEST",
        },
        "local_reply_config": {
            "mappers": [_not_served(), *(_reply(status, settings) for status in _REASONS)],
            "body_format": _body("server_error", "%LOCAL_REPLY_BODY%"),
        },
    }


def _reply(status: int, settings: EndpointSettings) -> dict[str, Any]:
    kind, message = _REASONS[status]
    equal = {"op": "EQ", "value": {"default_value": status, "runtime_key": f"replies.{status}"}}
    again = {"header": {"key": "retry-after", "value": str(RETRY_AFTER_SECONDS)}}
    return {
        "filter": {"status_code_filter": {"comparison": equal}},
        "body_format_override": _body(kind, message.format(**settings.model_dump())),
        **({"headers_to_add": [again]} if status in (502, 503) else {}),
    }


def _not_served() -> dict[str, Any]:
    """To who asks for a version that is not served."""
    equal = {"op": "EQ", "value": {"default_value": 404, "runtime_key": "replies.404"}}
    missing = {"status_code_filter": {"comparison": equal}}
    pinned = {"header_filter": {"header": {"name": PIN_HEADER, "present_match": True}}}
    message = f"the version of the model that {PIN_HEADER} names is not served here"
    return {
        "filter": {"and_filter": {"filters": [missing, pinned]}},
        "body_format_override": _body("invalid_request_error", message, "version_not_served"),
    }


def _body(kind: str, message: str, code: str = "%RESPONSE_CODE%") -> dict[str, Any]:
    """OpenAI's form of an error."""
    return {"json_format": {"error": {"message": message, "type": kind, "param": None, "code": code}}}


def _cluster(server: str, settings: EndpointSettings) -> dict[str, Any]:
    """Of one server; what it can take at a time is the middleware's to say."""
    address, port = host_and_port(server)
    place = {"socket_address": {"address": address, "port_value": port}}
    return {
        "name": server,
        "type": "STATIC",
        "connect_timeout": f"{CONNECT_SECONDS}s",
        "load_assignment": {
            "cluster_name": server,
            "endpoints": [{"lb_endpoints": [{"endpoint": {"address": place}}]}],
        },
        "circuit_breakers": _breakers(settings),
        "typed_extension_protocol_options": {
            "envoy.extensions.upstreams.http.v3.HttpProtocolOptions": {
                "@type": f"{_HTTP}.upstreams.http.v3.HttpProtocolOptions",
                # Sooner than the server closes it (`server.KEEP_SECONDS`): a request must not meet that.
                "common_http_protocol_options": {"idle_timeout": f"{IDLE_SECONDS // 2}s"},
                "explicit_http_config": {"http_protocol_options": {}},
            }
        },
    }


def _elsewhere(server: str, settings: EndpointSettings) -> dict[str, Any]:
    """Of an endpoint that is found by its name, which may have no address now: nothing waits for that."""
    named = {"type": "STRICT_DNS", "dns_lookup_family": "V4_PREFERRED", "wait_for_warm_on_init": False}
    return _cluster(server, settings) | named


def _breakers(settings: EndpointSettings) -> dict[str, Any]:
    """None but the connections that come in."""
    limits = ("max_connections", "max_pending_requests", "max_requests", "max_retries")
    return {"thresholds": [dict.fromkeys(limits, 2 * settings.max_connections + 64)]}


def _either(first: str, second: str, settings: EndpointSettings) -> dict[str, Any]:
    """The one, and for one more try the other."""
    return {
        "name": tried(first, second),
        "connect_timeout": f"{CONNECT_SECONDS}s",
        "circuit_breakers": _breakers(settings),
        "lb_policy": "CLUSTER_PROVIDED",
        "cluster_type": {
            "name": "envoy.clusters.aggregate",
            "typed_config": {
                "@type": f"{_HTTP}.clusters.aggregate.v3.ClusterConfig",
                "clusters": [first, second],
            },
        },
    }


def _certificate(folder: Path) -> dict[str, Any]:
    """Read anew whenever something is moved to the folder `tls`, where links lead to the user's files."""
    return {
        "name": "endpoint",
        "tls_certificate": {
            "certificate_chain": {"filename": str(folder / "tls" / "certificate")},
            "private_key": {"filename": str(folder / "tls" / "key")},
            "watched_directory": {"path": str(folder / "tls")},
        },
    }


def _from_file(folder: Path, name: str) -> dict[str, Any]:
    return {
        "resource_api_version": "V3",
        "path_config_source": {"path": str(folder / name), "watched_directory": {"path": str(folder)}},
    }


def _resources(kind: str, resources: Sequence[dict[str, Any]], group: str = "") -> dict[str, Any]:
    package, _, name = kind.partition(".")
    prefix = f"type.googleapis.com/envoy.config.{package}.v3" if group else f"{_HTTP}.transport_sockets.{package}.v3"
    content: list[dict[str, Any]] = [{"@type": f"{prefix}.{name}", **resource} for resource in resources]
    return {"version_info": digest_json(content)[:16], "resources": content}


class Counters(BaseModel):
    """What Envoy has seen of one server since it knows it: after a restart of Envoy, or of the server, from 0 on."""

    model_config = ConfigDict(frozen=True)

    requests: int = 0
    """Requests that were sent to it and have ended or have an answer's head; each try is one."""
    errors: int = 0
    """Of those, the ones that it answered with 5xx, or not at all."""
    broken: int = 0
    """Connections that it closed while it still had to answer, or in mid-answer."""
    refused: int = 0
    """Connections that it did not take."""
    active: int = 0
    """Requests that it has now."""


def server_of(url: str) -> str:
    """`address:port` of a server's URL, as `files` takes it."""
    return url.removeprefix("http://")


class Admin:
    """The admin interface of an Envoy, on its socket."""

    def __init__(self, path: str) -> None:
        self._path = path

    def get(self, path: str) -> Any:
        """JSON of an address.

        Raises:
            OSError: it does not answer.
        """
        return json.loads(self._ask("GET", path))

    def post(self, path: str) -> None:
        """Have it do something.

        Raises:
            OSError: it does not answer.
        """
        self._ask("POST", path)

    def counters(self) -> dict[str, Counters]:
        """Of every server that it knows, by `address:port`, and of probes beside them, by `routes.probed`.

        Raises:
            OSError: it does not answer.
        """
        stats = self.get("/stats?format=json&filter=^cluster%5C..*%5C.upstream_cx_destroy_remote_with_active_rq$")
        broken = {one["name"]: one["value"] for one in stats["stats"] if "name" in one}
        found = {}
        for cluster in self.get("/clusters?format=json").get("cluster_statuses", []):
            name = cluster["name"]
            for host in cluster.get("host_statuses", []):
                counted = {one["name"]: int(one.get("value", 0)) for one in host["stats"]}
                found[name] = Counters(
                    requests=counted["rq_total"] - counted["rq_active"],
                    errors=counted["rq_error"],
                    broken=broken.get(f"cluster.{name.replace(':', '_')}.upstream_cx_destroy_remote_with_active_rq", 0),
                    refused=counted["cx_connect_fail"],
                    active=counted["rq_active"],
                )
        return found

    def receiving(self, counted: dict[str, Counters]) -> int:
        """About how many requests have come in part, and are with no server yet.

        Raises:
            OSError: it does not answer.
        """
        found = self.get("/stats?format=json&filter=^http%5C.endpoint%5C.downstream_rq_active$")["stats"]
        here = sum(one.get("value", 0) for one in found)
        return max(0, here - sum(one.active for one in counted.values()))

    def _ask(self, method: str, path: str) -> bytes:
        connection = _UnixConnection(self._path)
        try:
            connection.request(method, path)
            return connection.getresponse().read()
        except http.client.HTTPException as error:
            raise OSError(str(error)) from None
        finally:
            connection.close()


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: str) -> None:
        super().__init__("127.0.0.1", timeout=10)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)
