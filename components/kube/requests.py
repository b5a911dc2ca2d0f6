"""Asks the API server, and goes on asking while it is away: an outage of hours must not cost a training job of days.

What can pass by itself (no connection, 5xx, 429) is asked again; what cannot (no right, no such resource, a refused
body) ends with an error that says what to do. Which objects there are is left to others.
"""

from __future__ import annotations

import json
import math
import re
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from nvila.components.kube.connect import Connection
from nvila.components.kube.errors import ApiError, Away, Conflict, Denied, NotKnown, NotServed, NotThere, Refused
from nvila.components.tracking.redact import tell

MERGE, APPLY = "application/merge-patch+json", "application/apply-patch+yaml"
"""Two ways to PATCH. JSON is YAML."""
CONNECT_SECONDS = 5
_LONGEST_PAUSE_SECONDS = 15.0
_DENIED = (401, 403, 404)
_NO_TLS = 0
"""The client's status where no TLS session came about: a wrong certificate, a balancer without a server behind it."""
_PASSING = (_NO_TLS, 408, 409, 410, 425, 429)


@dataclass(frozen=True)
class Patience:
    """How long an API server that does not do as asked is asked again."""

    contact_seconds: float = 600.0
    """Without any answer yet.

    It holds as well for a request that was granted before and is refused now: roles are made anew, tokens are checked
    by a service that is away.
    """
    denied_seconds: float = 20.0
    """Refused rights and unknown resources: a server that has just started says so for some seconds."""
    outage_seconds: float = math.inf
    """Once it has answered."""
    read_seconds: float = 30.0
    """For each answer."""

    @classmethod
    def within(cls, seconds: float) -> Patience:
        """Give up after this time, whether it has answered before or not."""
        return cls(seconds, min(seconds, cls.denied_seconds), seconds, min(seconds, cls.read_seconds))

    @classmethod
    def once(cls, seconds: float) -> Patience:
        """Ask once, and wait so long for the answer."""
        return cls(0.0, 0.0, 0.0, seconds)


@dataclass(frozen=True)
class Advice:
    """What people can do about a refusal, which depends on who asks for what."""

    right: str = "Ask whoever keeps the cluster for the right."
    kind: str = "Install what serves it."


class Requests:
    """Requests to one API server, answered with plain data."""

    def __init__(self, connection: Connection, patience: Patience = Patience(), advice: Advice = Advice()) -> None:
        self.connection = connection
        self._patience, self._advice = patience, advice
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
        form: str = "",
        patience: Patience | None = None,
    ) -> dict[str, Any]:
        """The answer's JSON.

        Args:
            form: `MERGE` or `APPLY`, for a PATCH.
            patience: for this request only.

        Raises:
            ApiError: one of its kinds, see `errors`.
        """
        patience = patience or self._patience
        request = _Request(method, path, form, body)
        began, pause, said = time.monotonic(), 0.5, False
        while True:
            try:
                answer = read(self._open(request, query, patience.read_seconds).data)
            except _broken() as error:
                problem = error
            else:
                break
            self._judge(request, problem, time.monotonic() - began, patience)
            if not said:
                self._say(f"{_reason(problem)}; asking again until it answers")
                said = True
            time.sleep(pause)
            pause = min(pause * 2, _LONGEST_PAUSE_SECONDS)
        if said:
            self._say(f"answers again after {time.monotonic() - began:.0f} s")
        self._answered = True
        self._granted.add((method, path))
        return answer

    @contextmanager
    def lines(self, path: str, query: Mapping[str, Any], silence_seconds: float) -> Iterator[Iterator[bytes]]:
        """The answer line by line as it comes, asked for once.

        Args:
            silence_seconds: the connection counts as broken when nothing comes for so long.

        Raises:
            Away: whatever went wrong, when it is opened or at any line.
        """
        try:
            response = self._open(_Request("GET", path), query, silence_seconds)
        except _broken() as error:
            raise Away(_reason(error), where=self.connection.host) from None
        try:
            yield self._lines(response)
        finally:
            response.close()
            response.release_conn()

    def _lines(self, response: Any) -> Iterator[bytes]:
        """Whole lines of a stream; what is left at its end is a line too."""
        rest = b""
        try:
            for chunk in response.stream(1 << 16, decode_content=True):
                *whole, rest = (rest + chunk).split(b"\n")
                yield from whole
        except _broken() as error:
            raise Away(_reason(error), where=self.connection.host) from None
        if rest:
            yield rest

    def _open(self, request: _Request, query: Mapping[str, Any] | None, read_seconds: float) -> Any:
        headers = {"Accept": "application/json"}
        if request.body is not None:
            headers["Content-Type"] = request.form or "application/json"
        response, _, _ = self.connection.client.call_api(
            request.path,
            request.method,
            query_params=list((query or {}).items()),
            header_params=headers,
            body=request.body,
            auth_settings=["BearerToken"],
            _preload_content=False,
            _request_timeout=(CONNECT_SECONDS, read_seconds),
        )
        return response

    def _judge(self, request: _Request, error: Exception, waited: float, patience: Patience) -> None:
        """Raise where asking again is of no use."""
        status, known, host = getattr(error, "status", None), _status_object(error), self.connection.host
        details = (known or {}).get("details") or {}
        if status == 404 and (name := details.get("name")):
            around = details.get("kind") == "namespaces" and not request.path.endswith(f"/{name}")
            raise (NotServed if around else NotThere)(_reason(error), where=host) from None
        if status == 409 and known and (known.get("reason") != "Conflict" or request.is_bound):
            raise Conflict(_reason(error), where=host) from None
        if status in _DENIED or (status == _NO_TLS and not self._answered):
            granted = (request.method, request.path) in self._granted
            if waited >= (patience.contact_seconds if granted else patience.denied_seconds):
                raise self._denied(request, error) from None
        elif status is not None and status not in _PASSING and status < 500:
            raise Refused(f"the API server refuses the request: {_reason(error)}", where=host) from None
        if waited >= (patience.outage_seconds if self._answered else patience.contact_seconds):
            raise Away(
                f"the API server does not answer: {_reason(error)}",
                where=host,
                do="See whether it may be reached from here (NetworkPolicy, proxy), and try again.",
            ) from None

    def _denied(self, request: _Request, error: Exception) -> ApiError:
        status, host, said = getattr(error, "status", None), self.connection.host, _reason(error)
        if status == 404:
            return NotServed(f"this cluster does not know {request.path}", where=host, do=self._advice.kind)
        if status == 403:
            rule = "A rule of the cluster (admission, quota) says so; rights are not what is missing."
            return Denied(said, where=host, do=self._advice.right if re.search('User ".*" cannot ', said) else rule)
        return NotKnown(f"the API server lets nobody in: {said}", where=host)

    def _say(self, text: str) -> None:
        print(tell(f"API server {self.connection.host}: {text}"), file=sys.stderr, flush=True)


@dataclass(frozen=True)
class _Request:
    method: str
    path: str
    form: str = ""
    body: Any = None

    @property
    def is_bound(self) -> bool:
        """Whether it has conditions of ours; any other conflict is one with a write at the same moment, and passes."""
        versioned = "resourceVersion" in ((self.body or {}).get("metadata") or {})
        return self.method == "DELETE" or self.form == APPLY or versioned


def _broken() -> tuple[type[Exception], ...]:
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


def _reason(error: Exception) -> str:
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
