"""Requests to an MLflow server, without importing MLflow: each is answered within bounds, or the server is away."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlencode

from nvila.components.contracts.environment import Environment, name_of
from nvila.components.contracts.errors import ConfigError, NvilaError, Unreachable
from nvila.components.contracts.text import brief
from nvila.components.data.remote.artifacts import Server
from nvila.components.tracking.redact import redact_text

QUIET_SECONDS = 5.0
"""Longest wait for a connection, and for the next bytes."""
SECONDS = 15.0
"""For a whole answer."""
MOST_BYTES = 64 * 2**20
_BLOCK = 1 << 16


class Unknown(NvilaError):
    """The server has no such thing, or not any more."""


class MlflowServer:
    """The one that the environment names as registry, or for all."""

    def __init__(self, here: Environment) -> None:
        """Nothing is asked yet.

        Raises:
            ConfigError: no server is named.
        """
        import urllib3

        named = Server(here.mlflow_registry_uri or here.mlflow_tracking_uri or "", here)
        self.where = named.where
        timeout = urllib3.Timeout(connect=QUIET_SECONDS, read=QUIET_SECONDS)
        headers = {"Content-Type": "application/json", **named.headers}
        self._pool = urllib3.PoolManager(maxsize=8, retries=False, timeout=timeout, headers=headers)

    def ask(self, method: str, path: str, fields: Mapping[str, Any]) -> dict[str, Any]:
        """The answer's JSON.

        Raises:
            Unreachable: no whole answer came, or the server says that it cannot work now.
            Unknown: it has not what was asked for.
            ConfigError: it lets nobody in, or is no MLflow.
            NvilaError: it does not take this.
        """
        if method == "GET":
            path, body = f"{path}?{urlencode(fields)}", None
        else:
            body = json.dumps(fields).encode()
        content = self._read(method, path, body)
        try:
            found = json.loads(content)
            if not isinstance(found, dict):
                raise ValueError("it is no object")
        except ValueError as error:
            raise ConfigError(
                f"the answer is none of MLflow's: {error}",
                where=self.where,
                do=f"Look at {name_of('mlflow_tracking_uri')}, and whether a proxy answers in its place.",
            ) from None
        return found

    def _read(self, method: str, path: str, body: bytes | None) -> bytes:
        from urllib3.exceptions import HTTPError

        until, where, content = time.monotonic() + SECONDS, f"{self.where}{path.partition('?')[0]}", bytearray()
        try:
            response = self._open(method, path, body)
            try:
                if response.status != 200:
                    raise self._refusal(response.status, response.read(_BLOCK), where)
                while some := response.read1(_BLOCK):
                    content += some
                    if len(content) > MOST_BYTES:
                        raise NvilaError(f"MLflow gives more than {MOST_BYTES:,} bytes", where=where)
                    if time.monotonic() > until:
                        raise _away(f"the answer was not whole after {SECONDS:.0f} s", where)
            finally:
                response.close()  # one that was read to its end has left its connection to the next request
        except (HTTPError, OSError) as error:
            raise _away(f"{type(error).__name__}: {error}", where) from None
        return bytes(content)

    def _open(self, method: str, path: str, body: bytes | None) -> Any:
        from urllib3.exceptions import ProtocolError

        for again in (True, False):
            try:
                return self._pool.request(method, self.where + path, body=body, preload_content=False)
            except ProtocolError:  # the server has just closed the connection that was kept
                if not again:
                    raise
        raise AssertionError

    def _refusal(self, status: int, content: bytes, where: str) -> NvilaError:
        try:
            said = json.loads(content)
            code, told = str(said["error_code"]), brief(redact_text(str(said.get("message", ""))), 300)
        except (ValueError, LookupError, TypeError, AttributeError):
            code, told = "", f"HTTP status {status}"
        if status == 429 or status >= 500:
            return _away(told, where)
        if code == "RESOURCE_DOES_NOT_EXIST":
            return Unknown(f"MLflow does not know it: {told}", where=where)
        if code and status not in (401, 403):
            return NvilaError(f"MLflow does not take this: {told}", where=where)
        return ConfigError(
            f"MLflow does not do as asked: {told}",
            where=where,
            do=f"Look at {name_of('mlflow_tracking_uri')} and the credentials for it.",
        )


def _away(told: str, where: str) -> Unreachable:
    return Unreachable(f"MLflow does not answer: {brief(redact_text(told), 300)}", where=where)
