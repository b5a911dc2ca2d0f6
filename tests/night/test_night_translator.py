from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import repeat
from pathlib import Path
from typing import Any

import pytest
import yaml
from kube import wait_for
from load import Request, Steady, send
from translator import API

from nvila.components.contracts.environment import for_child
from nvila.components.serve.interpreter import serve_python
from nvila.components.serve.ports import free_port

pytestmark = pytest.mark.slow
Object = dict[str, Any]


def server(handle: type[BaseHTTPRequestHandler]) -> ThreadingHTTPServer:
    made = ThreadingHTTPServer(("127.0.0.1", 0), handle)
    threading.Thread(target=made.serve_forever, daemon=True).start()
    return made


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def say(self, body: bytes) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


def backend(name: str) -> ThreadingHTTPServer:
    class Backend(Handler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            self.say(json.dumps(name).encode())

    return server(Backend)


class Stored:
    """An API server with one HTTPRoute and its Services."""

    def __init__(self) -> None:
        self.route: Object = {}
        self.services: list[Object] = []
        self.told: list[Object] = []
        stored = self

        class Api(Handler):
            def do_GET(self) -> None:
                found = [stored.route] if self.path == f"{API}/httproutes" else stored.services
                self.say(json.dumps({"items": found}).encode())

            def do_PATCH(self) -> None:
                stored.route["status"] = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["status"]
                stored.told.append(stored.route["status"])
                self.say(json.dumps(stored.route).encode())

        self.server = server(Api)

    def service(self, name: str) -> None:
        port = backend(name).server_port
        spec = {"clusterIP": "127.0.0.1", "ports": [{"port": port}]}
        self.services.append({"metadata": {"namespace": "n", "name": name}, "spec": spec})

    def shares(self, pinned: str = "", **weights: int) -> None:
        """Write the route: these weights, and one version that a header reaches."""
        ports = {one["metadata"]["name"]: one["spec"]["ports"][0]["port"] for one in self.services}
        refs = [{"name": name, "port": ports.get(name, 1), "weight": weight} for name, weight in weights.items()]
        rules: list[Object] = [{"backendRefs": refs}]
        if pinned:
            header = {"name": "x-nvila-version", "value": pinned}
            rules.append({"matches": [{"headers": [header]}], "backendRefs": [{"name": pinned, "port": ports[pinned]}]})
        generation = self.route.get("metadata", {}).get("generation", 0) + 1
        meta = {"namespace": "n", "name": "m", "generation": generation}
        spec = {"hostnames": ["m.test"], "parentRefs": [{"name": "gateway"}], "rules": rules}
        self.route = {"metadata": meta, "spec": spec, "status": self.route.get("status", {})}


@pytest.fixture
def front(tmp_path: Path) -> Iterator[tuple[Stored, str]]:
    stored, port = Stored(), free_port("127.0.0.1")
    stored.service("one")
    stored.shares(one=1)
    cluster = {"name": "c", "cluster": {"server": f"http://127.0.0.1:{stored.server.server_port}"}}
    context = {"name": "c", "context": {"cluster": "c", "user": "u"}}
    user = {"name": "u", "user": {"token": "t"}}
    config = {"current-context": "c", "clusters": [cluster], "contexts": [context], "users": [user]}
    (tmp_path / "kubeconfig").write_text(yaml.safe_dump(config))
    command = [sys.executable, str(Path(__file__).with_name("translator.py")), str(tmp_path), str(port)]
    variables = {
        "KUBECONFIG": str(tmp_path / "kubeconfig"),
        "NVILA_SERVE_PYTHON": str(serve_python()),
    }
    process = subprocess.Popen(command, env=for_child(variables))
    try:
        yield stored, f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait()


def asked(version: str = "") -> Request:
    headers = {"Host": "m.test", "Content-Type": "application/json"} | ({"x-nvila-version": version} if version else {})
    return Request("/v1/chat/completions", b"{}", headers)


def test_the_gateway_of_the_night_does_as_is_stored_and_loses_nothing(front: tuple[Stored, str]) -> None:
    """A request that the stand-in for a Gateway loses, or sends elsewhere, would be taken for a fault of ours."""
    stored, url = front
    wait_for(lambda: send(url, asked()).status == 200, "the first route")
    assert send(url, Request("/", b"{}", {"Host": "other.test"})).status == 404
    with Steady(url, repeat(asked()), clients=3, pause_seconds=0.01) as steady:

        def last() -> Counter[bytes]:
            return Counter(reply.body for reply in steady.replies[-20:])

        def has_a_share(name: str) -> bool:
            return last()[json.dumps(name).encode()] >= 5

        for name in ("two", "three", "four"):
            stored.service(name)
            stored.shares(pinned=name, one=50, **{name: 50})
            wait_for(partial(has_a_share, name), f"{name} gets no share")
            assert {send(url, asked(name)).body for _ in range(10)} == {json.dumps(name).encode()}
        stored.shares(one=0, four=100)
        wait_for(lambda: [*last()] == [b'"four"'], "others still get a share")
    assert len(steady.replies) > 100 and not steady.lost
    told = [one["parents"][0]["conditions"][0] for one in stored.told]
    assert [one["type"] for one in told] == ["Accepted"] * len(told)
    assert [one["observedGeneration"] for one in told] == [*range(1, len(told) + 1)]
    stored.shares(missing=1)
    wait_for(lambda: send(url, asked()).status == 503, "a Service that is not there answers")
    stored.shares(one=0)
    wait_for(lambda: send(url, asked()).status == 500, "a route without a share answers")
