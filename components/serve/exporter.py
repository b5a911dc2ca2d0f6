"""What a serving pod says of itself, on a port of its own: `/metrics` in Prometheus' form, and `/health` of the loop
that looks after the endpoint. No Service names the port, and nothing that users send comes here."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from nvila.components.contracts.counters import Counters, Window
from nvila.components.serve import counted, deployment, envoy
from nvila.components.serve.deployment import Wanted
from nvila.components.serve.routes import PROBED

PREFIX = "nvila_endpoint_"
_HELP = {
    "requests": "Requests that Envoy sent to the server of this pod and that have ended; each try is one.",
    "errors": "Of those, the ones that it answered with 5xx, or not, or not wholly.",
    "first_tokens": "Answers that have begun.",
    "first_token_seconds": "Summed over those, from the request to the first token.",
    "tokens": "Tokens behind the first ones.",
    "token_seconds": "Summed over those.",
    "restarts": "How often the server in this pod ended by itself.",
    "ready": "Whether the server in this pod takes requests.",
    "active": "Requests that it has now.",
}
_GAUGES = ("ready", "active")
_SECONDS = 10.0
"""How long a client may be silent."""


@dataclass(frozen=True)
class Told:
    """What a pod says."""

    counters: Counters = Counters()
    restarts: int = 0
    ready: bool = False
    active: int = 0


def write(told: Told, model: str, version: str) -> str:
    """The text of `/metrics`."""
    labels = f'{{model="{_escaped(model)}",version="{_escaped(version)}"}}'
    values = {**vars(told.counters), "restarts": told.restarts, "ready": int(told.ready), "active": told.active}
    lines = []
    for name, value in values.items():
        full = PREFIX + name + ("" if name in _GAUGES else "_total")
        lines += [f"# HELP {full} {_HELP[name]}", f"# TYPE {full} {'gauge' if name in _GAUGES else 'counter'}"]
        lines.append(f"{full}{labels} {value}")
    return "\n".join(lines) + "\n"


class Exporter:
    """Reads what the pod's one server has done; its numbers only grow, whichever of server and Envoy starts anew."""

    def __init__(self, runs: Path, goes_round: Callable[[], bool]) -> None:
        """Of the endpoint of a folder of runs.

        Args:
            runs: the folder.
            goes_round: whether the loop that looks after it does so.
        """
        self._runs, self._goes_round = runs, goes_round
        self._window, self._lock = Window(), threading.Lock()

    def listen(self, host: str, port: int) -> None:
        """Answer there until the process ends.

        Raises:
            OSError: nothing can listen there.
        """
        threading.Thread(target=_Server(host, port, self).serve_forever, daemon=True).start()

    def answer(self, path: str) -> tuple[int, str]:
        """Status and text."""
        if path == "/health":
            return (200, "ok\n") if self._goes_round() else (503, "the supervisor's loop hangs\n")
        wanted = deployment.read(self._runs, Wanted) if path == "/metrics" else None
        if wanted is None or wanted.champion is None:
            return 404, "there is nothing here\n"
        return 200, write(self._look(wanted), wanted.champion.name, wanted.champion.version)

    def _look(self, wanted: Wanted) -> Told:
        status = deployment.running(self._runs)
        one = status.of("champion") if status else None
        if status is None or one is None:
            return Told(self._window.total)
        # Of a server that has ended, Envoy still tells what became of its last requests.
        seen = {
            place: of
            for place, of in _seen(status.admin).items()
            if place != wanted.fallback and not place.startswith(PROBED)
        }
        said = {f"Envoy, {place}": counted.sent(of) for place, of in seen.items()}
        if (times := counted.times(one.url)) is not None:
            said[f"vLLM, {one.pid}"] = times
        with self._lock:
            self._window = self._window.read(said)
        active = sum(of.active for of in seen.values())
        return Told(self._window.total, one.restarts, one.state == "ready", active)


def _seen(admin: str) -> dict[str, envoy.Counters]:
    try:
        return envoy.Admin(admin).counters()
    except OSError:
        return {}


def _escaped(text: str) -> str:
    return text.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, host: str, port: int, exporter: Exporter) -> None:
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self.exporter = exporter
        super().__init__((host, port), _Handler)

    def handle_error(self, *_: object) -> None:
        """A client that hangs up is nobody's fault."""


class _Handler(BaseHTTPRequestHandler):
    timeout = _SECONDS
    server: _Server

    def do_GET(self) -> None:
        """As `Exporter.answer`."""
        status, text = self.server.exporter.answer(self.path)
        body = text.encode()
        self.send_response(status)
        self.send_header("Content-Type", "text/plain; version=0.0.4; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Probes come every few seconds."""
