"""A small API server in this process: objects by their path, with generations, discovery, and errors as the real one's.

It knows no schema, no rights and no server-side apply; `refuse` and `away` play what a real one says then.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from nvila.components.contracts.modelrollout import API, GROUP, PLURAL, VERSION

NAMESPACE = "team-a"
LISTS = {PLURAL, "gateways", "nodes", "resourcequotas", "pods", "configmaps"}
SPEC: dict[str, Any] = {"model": "small", "image": "r/serve@sha256:1", "gateway": {"name": "public"}}


class ApiServer(ThreadingHTTPServer):
    """Answers at `url`; a test changes `objects` as a controller would, through `status`."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.objects: dict[str, dict[str, Any]] = {}
        self.served = {GROUP: {VERSION: [PLURAL]}, "gateway.networking.k8s.io": {"v1": ["gateways", "httproutes"]}}
        self.refuse: dict[str, tuple[int, dict[str, Any]]] = {}
        """By how a path begins: status and Status object."""
        self.away = False
        self.asked: list[str] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def kubeconfig(self, folder: Path) -> str:
        """A file that names this server."""
        content = {
            "clusters": [{"name": "c", "cluster": {"server": self.url}}],
            "contexts": [{"name": "c", "context": {"cluster": "c", "user": "u", "namespace": NAMESPACE}}],
            "current-context": "c",
            "users": [{"name": "u", "user": {}}],
        }
        (folder / "kubeconfig").write_text(json.dumps(content))
        return str(folder / "kubeconfig")

    def put(self, path: str, **content: Any) -> dict[str, Any]:
        """An object at its path below the API, such as `api/v1/nodes/n1`."""
        made = {"metadata": {"name": path.rpartition("/")[2], "generation": 1} | content.pop("metadata", {})} | content
        self.objects[path] = made
        return made

    def rollout(self, name: str, status: dict[str, Any] | None = None, **spec: Any) -> dict[str, Any]:
        """A ModelRollout."""
        return self.put(rollout_path(name), spec=SPEC | spec, status=status or {})

    def answer(self, method: str, path: str, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        """Status and object."""
        for beginning, answer in self.refuse.items():
            if path.startswith(beginning):
                return answer
        parts = path.split("/")
        if parts[0] == "apis" and len(parts) < 4:
            return self._discovery(parts[1:])
        listed = parts[-1] in LISTS
        kind, name = (parts[-1], "") if listed else (parts[-2], parts[-1])
        if parts[0] == "apis" and kind not in self.served.get(parts[1], {}).get(parts[2], []):
            return 404, {}
        if method == "POST":
            return self._create(f"{path}/{body['metadata']['name']}", body)
        if listed:
            return 200, {"items": [one for at, one in self.objects.items() if at.rpartition("/")[0] == path]}
        found = self.objects.get(path)
        if found is None:
            return 404, _said("NotFound", f'{kind} "{name}" not found', name=name, kind=kind)
        if method == "PATCH":
            _merge(found, body)
            found["metadata"]["generation"] += 1
        return 200, found

    def _create(self, path: str, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        if path in self.objects:
            return 409, _said("AlreadyExists", "already exists", name=path.rpartition("/")[2])
        return 201, self.put(path, **body)

    def _discovery(self, parts: list[str]) -> tuple[int, dict[str, Any]]:
        versions = self.served.get(parts[0])
        if versions is None or (len(parts) > 1 and parts[1] not in versions):
            return 404, {}
        if len(parts) == 1:
            return 200, {"versions": [{"groupVersion": f"{parts[0]}/{version}"} for version in versions]}
        return 200, {"resources": [{"name": name} for name in versions[parts[1]]]}


def rollout_path(name: str) -> str:
    """Where a ModelRollout is."""
    return f"apis/{API}/namespaces/{NAMESPACE}/{PLURAL}/{name}"


def forbidden(what: str) -> tuple[int, dict[str, Any]]:
    """What an account without the right is told."""
    return 403, _said("Forbidden", f'{what} is forbidden: User "u" cannot list resource "{what}"')


@contextmanager
def running() -> Iterator[ApiServer]:
    """A server until the context ends."""
    server = ApiServer()
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    server: ApiServer

    def do_GET(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        body = json.loads(self.rfile.read(length)) if length else {}
        path = self.path.partition("?")[0].strip("/")
        self.server.asked.append(f"{self.command} {path}")
        if self.server.away:
            self.connection.close()
            return
        status, answer = self.server.answer(self.command, path, body)
        self.send_response(status)
        self.end_headers()
        self.wfile.write(json.dumps(answer).encode() if answer or status == 200 else b"404 page not found")

    do_POST = do_PATCH = do_GET

    def log_message(self, format: str, *args: object) -> None:
        return


def _said(reason: str, message: str, **details: str) -> dict[str, Any]:
    return {"kind": "Status", "reason": reason, "message": message, "details": details}


def _merge(into: dict[str, Any], change: dict[str, Any]) -> None:
    for name, value in change.items():
        if value is None:
            into.pop(name, None)
        elif isinstance(value, dict) and isinstance(into.get(name), dict):
            _merge(into[name], value)
        else:
            into[name] = value
