"""Asks the API server, and goes on asking while it is away: an outage of hours must not cost a training job of days.

What can pass by itself (no connection, 5xx, 429) is asked again; what cannot (no right, no such resource, a refused
body) ends with an error that says what to do. Which objects there are is left to others.
"""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from nvila.components.contracts.environment import current
from nvila.components.contracts.errors import ConfigError, NvilaError, PreflightError
from nvila.components.tracking.redact import tell

T = TypeVar("T")
NAMESPACE_FILE = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")
CONNECT_SECONDS, READ_SECONDS = 5, 30
_LONGEST_PAUSE_SECONDS = 15.0
_DENIED = (401, 403, 404)
_NO_TLS = 0
"""The client's status where no TLS session came about: a wrong certificate, a balancer without a server behind it."""
_PASSING = (_NO_TLS, 408, 409, 410, 425, 429)


@dataclass(frozen=True)
class Patience:
    """How long an API server that does not do as asked is asked again."""

    contact_seconds: float = 600.0
    """Without any answer yet. Once it has answered, an outage is waited out, however long it lasts.

    It holds as well for a request that was granted before and is refused now: roles are made anew, tokens are checked
    by a service that is away.
    """
    denied_seconds: float = 20.0
    """Refused rights and unknown resources: a server that has just started says so for some seconds."""


class NotThere(Exception):
    """The object does not exist."""


class Exists(Exception):
    """An object of that name exists already, or is another one than was meant."""


class Requests:
    """Requests to one API server, answered with plain data."""

    def __init__(self, patience: Patience = Patience()) -> None:
        """Read KUBECONFIG, or the service account of the pod.

        Raises:
            PreflightError: there is neither.
        """
        self._patience = patience
        self._client, self.namespace = _connect()
        self.host = self._client.configuration.host
        self._answered = False
        self._granted: set[tuple[str, str]] = set()
        """Methods and paths that were answered."""

    def ask(
        self,
        method: str,
        path: str,
        *,
        query: Mapping[str, Any] | None = None,
        body: Any = None,
        within_seconds: float | None = None,
    ) -> dict[str, Any]:
        """The answer's JSON.

        Args:
            within_seconds: give up an API server that is away after this time, whether it has answered before or not.

        Raises:
            NotThere, Exists: as the API says.
            PreflightError: no right to do this, or the cluster does not know the resource.
            ConfigError: the API refuses the body.
            NvilaError: the API server could not be reached in time.
        """
        read_seconds = READ_SECONDS if within_seconds is None else min(READ_SECONDS, within_seconds)
        answer = self._patiently(
            (method, path), lambda: read(self._open(method, path, query, body, read_seconds).data), within_seconds
        )
        self._granted.add((method, path))
        return answer

    @contextmanager
    def lines(self, path: str, query: Mapping[str, Any], silence_seconds: float) -> Iterator[Iterator[bytes]]:
        """The answer line by line as it comes, asked for once: any failure is the caller's to handle.

        Args:
            silence_seconds: the connection counts as broken when nothing comes for so long.
        """
        response = self._open("GET", path, query, None, read_seconds=silence_seconds)
        try:
            yield _lines(response)
        finally:
            response.close()
            response.release_conn()

    def _open(
        self, method: str, path: str, query: Mapping[str, Any] | None, body: Any, read_seconds: float = READ_SECONDS
    ) -> Any:
        headers = {"Accept": "application/json"}
        if body is not None:
            headers["Content-Type"] = "application/merge-patch+json" if method == "PATCH" else "application/json"
        response, _, _ = self._client.call_api(
            path,
            method,
            query_params=list((query or {}).items()),
            header_params=headers,
            body=body,
            auth_settings=["BearerToken"],
            _preload_content=False,
            _request_timeout=(CONNECT_SECONDS, read_seconds),
        )
        return response

    def _patiently(self, request: tuple[str, str], call: Callable[[], T], within_seconds: float | None) -> T:
        began, pause, said = time.monotonic(), 0.5, False
        while True:
            try:
                answer = call()
            except broken() as error:
                problem = error
            else:
                if said:
                    self._say(f"answers again after {time.monotonic() - began:.0f} s")
                self._answered = True
                return answer
            waited = time.monotonic() - began
            self._judge(request, problem, waited, within_seconds)
            if not said:
                self._say(f"{reason(problem)}; asking again until it answers")
                said = True
            time.sleep(pause)
            pause = min(pause * 2, _LONGEST_PAUSE_SECONDS)

    def _judge(self, request: tuple[str, str], error: Exception, waited: float, within_seconds: float | None) -> None:
        """Raise where asking again is of no use."""
        status = getattr(error, "status", None)
        known = _status_object(error)
        if status == 404 and known and (details := known.get("details") or {}).get("name"):
            if details.get("kind") == "namespaces":
                raise PreflightError(reason(error), where=self.host) from None
            raise NotThere(reason(error)) from None
        # Only a deletion has conditions of ours; any other conflict is one with a write at the same moment.
        if status == 409 and known and (known.get("reason") != "Conflict" or request[0] == "DELETE"):
            raise Exists(reason(error)) from None
        if status in _DENIED or (status == _NO_TLS and not self._answered):
            bearable = self._patience.contact_seconds if request in self._granted else self._patience.denied_seconds
            if waited > (bearable if within_seconds is None else min(bearable, within_seconds)):
                raise _denied(error, self.host) from None
        elif status is not None and status not in _PASSING and status < 500:
            raise ConfigError(f"the API server refuses the request: {reason(error)}", where=self.host) from None
        limit = within_seconds if within_seconds is not None else self._patience.contact_seconds
        if waited > limit and (within_seconds is not None or not self._answered):
            raise NvilaError(
                f"the API server does not answer: {reason(error)}",
                where=self.host,
                do="See whether pods of this namespace may reach it (NetworkPolicy, proxy), and run again.",
            ) from None

    def _say(self, text: str) -> None:
        print(tell(f"API server {self.host}: {text}"), file=sys.stderr, flush=True)


def broken() -> tuple[type[Exception], ...]:
    """Every way in which a request can fail."""
    from kubernetes.client.exceptions import ApiException
    from urllib3.exceptions import HTTPError

    return (ApiException, HTTPError, OSError, ValueError)


def read(answer: bytes) -> dict[str, Any]:
    """The object that an answer is.

    Raises:
        ValueError: it is something else; a proxy may have answered.
    """
    found = json.loads(answer)
    if not isinstance(found, dict):
        raise ValueError(f"not an object of the API: {answer[:80]!r}")
    return found


def reason(error: Exception) -> str:
    """In the API server's own words where it said something."""
    known = _status_object(error)
    if known and known.get("message"):
        return str(known["message"])
    status = getattr(error, "status", None)
    said = f"HTTP {status}: {getattr(error, 'reason', '')}" if status else f"{type(error).__name__}: {error}"
    return " ".join(said.split())


def _status_object(error: Exception) -> dict[str, Any] | None:
    """The API's own account of what went wrong; a proxy in between, or a resource that is not served, gives none."""
    try:
        content = json.loads(getattr(error, "body", None) or b"")
    except ValueError:
        return None
    return content if isinstance(content, dict) and content.get("kind") == "Status" else None


def _denied(error: Exception, host: str) -> PreflightError:
    status = getattr(error, "status", None)
    if status == 404:
        return PreflightError(
            "this cluster has no TrainJob resource",
            where=host,
            do="Install Kubeflow Trainer 2, or compile with `--launch pods`: steps then work in their own pods.",
        )
    if status == 403:
        said = reason(error)
        lacks_right = re.search(r'User ".*" cannot ', said)
        return PreflightError(
            said,
            where=host,
            do="Bind the Role nvila-launcher of the chart to the service account of the run's pods."
            if lacks_right
            else "A rule of the cluster (admission, quota) says so; rights are not what is missing.",
        )
    return PreflightError(f"the API server lets nobody in: {reason(error)}", where=host)


def _connect() -> tuple[Any, str]:
    """A client, and the namespace it works in."""
    import yaml
    from kubernetes import client, config

    configuration = client.Configuration()
    here = current()
    path = here.kubeconfig  # named, as the library reads the variable when it is imported
    try:
        if path:
            config.load_kube_config(path, client_configuration=configuration)
            _, context = config.list_kube_config_contexts(path)
            namespace = context["context"].get("namespace", "default")
        elif here.in_cluster:
            config.load_incluster_config(client_configuration=configuration)
            namespace = NAMESPACE_FILE.read_text().strip()
        else:
            raise PreflightError(
                "there is no cluster here that could take the job",
                where="NVILA_SITE",
                do="Set KUBECONFIG, or unset NVILA_SITE: steps then work in their own processes.",
            )
    except (config.ConfigException, yaml.YAMLError, OSError) as error:
        where = f"KUBECONFIG={path}" if path else "the pod's service account"
        raise PreflightError(f"the access to the cluster cannot be read: {error}", where=where) from None
    configuration.retries = False  # what is asked again, and how often, is decided here
    return client.ApiClient(configuration), namespace


def _lines(response: Any) -> Iterator[bytes]:
    """Whole lines of a stream; what is left at its end is a line too."""
    rest = b""
    for chunk in response.stream(1 << 16, decode_content=True):
        *whole, rest = (rest + chunk).split(b"\n")
        yield from whole
    if rest:
        yield rest
