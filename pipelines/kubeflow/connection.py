"""The connection to an API server of Kubeflow Pipelines: token, proxy, patience; and its errors in our words."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from nvila.components.contracts.environment import Environment
from nvila.components.contracts.errors import ConfigError, NvilaError, Unreachable
from nvila.components.contracts.exits import Exit
from nvila.pipelines.kubeflow.access import PROXY, TOKEN_VARIABLE, api_url, proxy_for, readable, token_of

T = TypeVar("T")
TIMEOUT_SECONDS = (5.0, 30.0)
"""To connect, and to wait for an answer."""
_BUSY = (429, 500, 502, 503, 504)


class ServerDown(NvilaError):
    """The server does not answer, or answers with a fault of its own; a run that is under way goes on."""

    exit_code = Exit.USER


class Conflict(ConfigError):
    """Something of that name is there already."""


class NotFound(ConfigError):
    """There is no such thing, or none that we may see."""


class Connection:
    """A client of one server; what is asked of it goes through `call`.

    Args:
        host: URL, such as https://kubeflow.example/pipeline.
        here: where a token is, without such a file.
        token_file: file that holds the bearer token; read before every call, for tokens are renewed there.
        ca_cert: PEM file that the server's certificate is checked with; by default the public authorities.

    Raises:
        ConfigError: no URL, a file that cannot be read, or a proxy of a kind that cannot be used.
    """

    def __init__(
        self, host: str, here: Environment, *, token_file: Path | None = None, ca_cert: Path | None = None
    ) -> None:
        import kfp_server_api as api
        from urllib3 import Retry, make_headers

        self.host = api_url(host)
        self._token_file, self._here = token_file, here
        configuration = api.Configuration(host=self.host)
        if ca_cert:
            readable(ca_cert, "--ca-cert")
            configuration.ssl_ca_cert = str(ca_cert)
        self._proxy = proxy_for(self.host)
        if self._proxy:
            configuration.proxy = self._proxy.url
            if self._proxy.login:
                configuration.proxy_headers = make_headers(proxy_basic_auth=self._proxy.login)
        # Requests that change nothing are tried again; a run must not be created twice. Redirections lead to a page for
        # people, whose text the client would take for an answer without any values. Who hangs once is asked once more.
        configuration.retries = Retry(
            total=4,
            connect=2,
            read=1,
            redirect=False,
            backoff_factor=0.3,
            status_forcelist=_BUSY,
            raise_on_status=False,
        )
        configuration.api_key_prefix["authorization"] = "Bearer"
        configuration.refresh_api_key_hook = self._refresh_token
        self._refresh_token(configuration)
        self.client = api.ApiClient(configuration)

    def call(self, method: Callable[..., T], *args: Any, **kwargs: Any) -> T:
        """What a method of the client answers.

        Raises:
            ServerDown: nobody answers, or it cannot be read.
            ConfigError: the server refuses.
        """
        from kfp_server_api import ApiException
        from urllib3.exceptions import HTTPError

        try:
            answer = method(*args, **kwargs, _request_timeout=TIMEOUT_SECONDS)
        except ApiException as error:
            raise self._explained(error.status, error.body or error.reason) from None
        except HTTPError as error:
            reason = self._without_token(str(getattr(error, "reason", None) or error))
            raise ServerDown(f"no answer: {reason}", where=self.host, do=self._advice(reason)) from None
        except (ValueError, TypeError, AttributeError) as error:  # the client's own, of an answer that fits no model
            raise self._unreadable(type(error).__name__) from None
        text = self.client.last_response.data
        if not text.lstrip().startswith("{"):
            raise self.elsewhere("it answers with a page" if text.strip() else "it answers with nothing")
        try:
            json.loads(text)
        except ValueError:  # the client takes what is cut off for an answer without any values
            raise self._unreadable("it is no JSON") from None
        return answer

    def _advice(self, reason: str) -> str:
        if "CERTIFICATE" in reason:
            return "Does --ca-cert name the authority's PEM file?"
        if self._proxy:
            return f"It was asked through the proxy {self._proxy.url}; {PROXY} names hosts that are asked directly."
        return "Is the URL right, and can this machine reach it?"

    def _unreadable(self, found: str) -> ServerDown:
        return ServerDown(f"the answer cannot be read: {found}", where=self.host)

    def elsewhere(self, found: str) -> ConfigError:
        """That who answers is somebody else."""
        return ConfigError(
            f"this is not the API of Kubeflow Pipelines: {found}",
            where=self.host,
            do="Who has no valid token is sent to log in (--token-file); and the URL often ends in /pipeline.",
        )

    def _explained(self, status: int, body: str | bytes | None) -> NvilaError:
        said = self._without_token(_message(body))
        if not status:  # the client's own word for an answer that fits no model
            return self._unreadable(said)
        if status == 401:
            return ConfigError(
                "the server does not accept the token"
                if token_of(self._token_file, self._here)
                else "the server asks for a token",
                where=self.host,
                do=f"Give --token-file, or {TOKEN_VARIABLE} in the environment.",
            )
        if status == 403:
            return ConfigError(f"not allowed: {said}", where=self.host, do="Is --namespace yours?")
        if 300 <= status < 400:
            return self.elsewhere(f"it sends us elsewhere ({status})")
        kinds: dict[int, type[NvilaError]] = {404: NotFound, 409: Conflict}
        if status in _BUSY or status >= 500:
            return ServerDown(f"the server answers {status}: {said}", where=self.host)
        return kinds.get(status, ConfigError)(f"the server refuses ({status}): {said}", where=self.host)

    def _refresh_token(self, configuration: Any) -> None:
        if token := token_of(self._token_file, self._here):
            configuration.api_key["authorization"] = token

    def _without_token(self, text: str) -> str:
        """What the server says may repeat what it was sent."""
        token = token_of(self._token_file, self._here)
        return text.replace(token, "***") if token else text


def patiently(call: Callable[[], T], seconds: float, told: Callable[[str], None], pause_seconds: float) -> T:
    """The call's result, tried again for so long while there is none; `told` gets a line of each new reason.

    A token that has expired is such a reason: it is renewed in its file, sooner or later. What is not there stays away.

    Raises:
        Unreachable: the server was away for longer; the run goes on.
        NvilaError: there was none for longer, for another reason.
    """
    began = time.monotonic()
    last = ""
    while True:
        try:
            return call()
        except NotFound:
            raise
        except NvilaError as error:
            if time.monotonic() - began > seconds:
                if seconds and isinstance(error, ServerDown):
                    raise Unreachable(str(error), do="The run goes on all the same.") from None
                raise
            if str(error) != last:
                told(f"{str(error).rstrip('.')}; the run goes on, trying again")
                last = str(error)
            time.sleep(pause_seconds)


_SAID = ("message", "error_message", "error")


def _message(body: str | bytes | None) -> str:
    """The server's own sentence, in one line."""
    text = body.decode(errors="replace") if isinstance(body, bytes) else body or ""
    try:
        content = json.loads(text)
        text = str(next(filter(None, map(content.get, _SAID)), text)) if isinstance(content, dict) else text
    except ValueError:
        pass
    return plain(text)[:300] or "no reason given"


def plain(text: str) -> str:
    """One line of text from elsewhere, without what would move a terminal's cursor or change its colours."""
    return "".join(c for c in " ".join(text.split()) if c.isprintable())
