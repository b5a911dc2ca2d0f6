"""What the controller says of itself: JSON lines, Prometheus metrics, an Event and a webhook message per decision."""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, get_args

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from nvila.components.contracts.errors import NvilaError
from nvila.components.contracts.modelrollout import API, KIND, Decided, Phase, Status, Verdict
from nvila.components.kube.cluster import EVENT, Cluster
from nvila.components.kube.errors import ApiError
from nvila.components.tracking.redact import redact_text

MESSAGE_CHARACTERS = 1000
"""Of an Event's; Kubernetes takes 1,024."""
KIND_OF_MESSAGE = "nvila.rollout.decided"
"""Type of the webhook's events."""
ATTEMPTS = 3
"""Of the webhook, each with tries of its own; then the message is given up."""
STALE_SECONDS = 60.0
"""Without a round for so long, the controller is not well."""


def say(message: str, **fields: Any) -> None:
    """A JSON line on stdout."""
    now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    line = {"time": now, "message": redact_text(message), **fields}
    sys.stdout.write(json.dumps(line, default=str) + "\n")
    sys.stdout.flush()


class Metrics:
    """All that Prometheus reads."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        names = ("namespace", "rollout", "model")
        kept: dict[str, Any] = {"registry": self.registry}
        self.rounds = Counter("nvila_controller_rounds", "Rounds of the loop", **kept)
        self.seconds = Histogram("nvila_controller_round_seconds", "Time of a round", **kept)
        self.errors = Counter("nvila_controller_errors", "What went wrong in a round", ["what"], **kept)
        self.leader = Gauge("nvila_controller_leader", "Whether this process acts", **kept)
        self.reachable = Gauge("nvila_registry_reachable", "Whether MLflow answers", **kept)
        self.phase = Gauge("nvila_rollout_phase", "Whether it is in this phase", [*names, "phase"], **kept)
        self.weight = Gauge("nvila_rollout_weight", "Per cent of requests of the version that is tried", names, **kept)
        self.step = Gauge("nvila_rollout_step", "Step of the version that is tried", names, **kept)
        self.decisions = Counter("nvila_rollout_decisions", "Decisions", [*names, "verdict"], **kept)
        self.last = time.monotonic()

    def show(self, namespace: str, rollout: str, status: Status) -> None:
        """How one stands."""
        where = (namespace, rollout, status.model)
        for phase in get_args(Phase):
            self.phase.labels(*where, phase).set(phase == status.phase)
        self.weight.labels(*where).set(status.weight)
        self.step.labels(*where).set(status.step)
        for verdict in get_args(Verdict):
            self.decisions.labels(*where, verdict)  # from 0 on, or an increase would not see the first one

    def forget(self, namespace: str, rollout: str, model: str) -> None:
        """One that is gone."""
        where = (namespace, rollout, model)
        for phase in get_args(Phase):
            self.phase.remove(*where, phase)
        self.weight.remove(*where)
        self.step.remove(*where)

    @property
    def well(self) -> bool:
        """Whether the loop goes round."""
        return time.monotonic() - self.last < STALE_SECONDS

    def serve(self, host: str, port: int) -> ThreadingHTTPServer:
        """Answer `/metrics` and `/healthz` from now on.

        Raises:
            OSError: nothing can listen there.
        """
        server = ThreadingHTTPServer((host, port), _handler(self))
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, daemon=True).start()
        return server


def _handler(metrics: Metrics) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        timeout = 10

        def log_message(self, *_: Any) -> None:
            """Say nothing of each probe."""

        def do_GET(self) -> None:
            """Of the two paths."""
            if self.path == "/metrics":
                self._answer(200, generate_latest(metrics.registry), "text/plain; version=0.0.4; charset=utf-8")
            elif self.path == "/healthz":
                self._answer(200 if metrics.well else 503, b"goes round\n" if metrics.well else b"stands still\n")
            else:
                self._answer(404, b"")

        def _answer(self, status: int, body: bytes, kind: str = "text/plain") -> None:
            self.send_response(status)
            self.send_header("content-type", kind)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    return Handler


def record(cluster: Cluster, made: Mapping[str, Any], decided: Decided) -> None:
    """An Event of the ModelRollout for a decision; one that does not come about is not missed."""
    meta = made["metadata"]
    text = f"version {decided.version}: {'; '.join(decided.reasons)}"
    body = {
        "metadata": {"generateName": f"{meta['name'][:40]}-", "namespace": meta["namespace"]},
        "involvedObject": {
            "apiVersion": API,
            "kind": KIND,
            "name": meta["name"],
            "namespace": meta["namespace"],
            "uid": meta["uid"],
        },
        "reason": "".join(word.capitalize() for word in decided.verdict.split()),
        "message": text[:MESSAGE_CHARACTERS],
        "type": "Warning" if decided.verdict in ("rolled back", "refused") else "Normal",
        "firstTimestamp": decided.at,
        "lastTimestamp": decided.at,
        "count": 1,
        "source": {"component": "nvila-controller"},
    }
    try:
        cluster.create(EVENT, body)
    except ApiError as error:
        say(f"no Event: {error}", rollout=meta["name"], namespace=meta["namespace"])


class Webhook:
    """Tells the notification webhook of decisions, in the background; each at least once, as far as it listens."""

    def __init__(self, url: str, secret: str) -> None:
        self._url, self._secret = url, secret
        self._pool = ThreadPoolExecutor(2, thread_name_prefix="webhook")
        self._under_way: set[tuple[str, ...]] = set()
        self._lock = threading.Lock()
        self._done: set[tuple[str, ...]] = set()

    def told(self, namespace: str, rollout: str, model: str, decided: Decided) -> bool:
        """Whether it has the decision, or never will; until then it is being told."""
        if not self._url:
            return True
        key = (namespace, rollout, decided.at, decided.version, decided.verdict)
        with self._lock:
            if key in self._done:
                self._done.discard(key)
                return True
            if key in self._under_way:
                return False
            self._under_way.add(key)
        about = {"namespace": namespace, "rollout": rollout, "model": model}
        told = decided.model_dump(mode="json", exclude={"told"}, exclude_none=True)
        self._pool.submit(self._post, key, about | told)
        return False

    def _post(self, key: tuple[str, ...], data: dict[str, Any]) -> None:
        from nvila.components.report.webhook import post

        for attempt in range(ATTEMPTS):
            try:
                post(self._url, KIND_OF_MESSAGE, data, self._secret)
                break
            except NvilaError as error:
                say(f"webhook, try {attempt + 1} of {ATTEMPTS}: {error}", rollout=data["rollout"])
        with self._lock:
            self._under_way.discard(key)
            self._done.add(key)
