"""A Kubeflow Pipelines API server (v2beta1) as `nvila submit` needs it: few calls, and its errors in our words."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from nvila.components.contracts.environment import Environment
from nvila.components.contracts.errors import ConfigError, NvilaError
from nvila.pipelines.kubeflow.access import TOKEN_VARIABLE, api_url, readable, token_of

if TYPE_CHECKING:
    from kfp_server_api import V2beta1Experiment, V2beta1Pipeline, V2beta1PipelineVersion, V2beta1Run

T = TypeVar("T")
TIMEOUT_SECONDS = (5.0, 60.0)
"""To connect, and to wait for an answer."""
PAGE = 100
_BUSY = (429, 500, 502, 503, 504)


class ServerDown(NvilaError):
    """The server does not answer, or answers with a fault of its own; a run that is under way goes on."""


class Server:
    """One API server.

    Args:
        host: URL, such as https://kubeflow.example/pipeline.
        here: where a token is, without such a file.
        token_file: file that holds the bearer token; read before every call, for tokens are renewed there.
        ca_cert: PEM file that the server's certificate is checked with; by default the public authorities.

    Raises:
        ConfigError: no URL, or a file that cannot be read.
    """

    def __init__(
        self, host: str, here: Environment, *, token_file: Path | None = None, ca_cert: Path | None = None
    ) -> None:
        import kfp_server_api as api
        from urllib3 import Retry

        self.host = api_url(host)
        self._token_file, self._here = token_file, here
        configuration = api.Configuration(host=self.host)
        if ca_cert:
            readable(ca_cert, "--ca-cert")
            configuration.ssl_ca_cert = str(ca_cert)
        # Requests that change nothing are tried again; a run must not be created twice. Redirections lead to a page for
        # people, whose text the client would take for an answer without any values.
        configuration.retries = Retry(
            total=4, redirect=False, backoff_factor=0.3, status_forcelist=_BUSY, raise_on_status=False
        )
        configuration.api_key_prefix["authorization"] = "Bearer"
        configuration.refresh_api_key_hook = self._refresh_token
        self._refresh_token(configuration)
        self._client = client = api.ApiClient(configuration)
        self._health = api.HealthzServiceApi(client)
        self._pipelines = api.PipelineServiceApi(client)
        self._uploads = api.PipelineUploadServiceApi(client)
        self._experiments = api.ExperimentServiceApi(client)
        self._runs = api.RunServiceApi(client)

    def multi_user(self) -> bool:
        """Whether users have namespaces of their own."""
        return bool(self._call(self._health.healthz_service_get_healthz).multi_user)

    def pipeline(self, name: str, namespaces: Iterable[str | None]) -> V2beta1Pipeline | None:
        """The pipeline of that name in the first of the namespaces that has it; None stands for the shared ones."""
        for namespace in namespaces:
            given = {"namespace": namespace} if namespace else {}
            try:
                return self._call(self._pipelines.pipeline_service_get_pipeline_by_name, name, **given)
            except _NotFound:
                continue
        return None

    def create_pipeline(self, name: str, title: str, description: str, namespace: str | None) -> V2beta1Pipeline:
        """A new pipeline without a version.

        Raises:
            Conflict: it is there already.
        """
        import kfp_server_api as api

        pipeline = api.V2beta1Pipeline(name=name, display_name=title, description=description, namespace=namespace)
        return self._call(self._pipelines.pipeline_service_create_pipeline, pipeline=pipeline)

    def versions(self, pipeline_id: str) -> Iterator[V2beta1PipelineVersion]:
        """Versions of a pipeline, newest first."""

        def page(**kwargs: Any) -> Any:
            return self._pipelines.pipeline_service_list_pipeline_versions(
                pipeline_id, sort_by="created_at desc", **kwargs
            )

        return self._pages(page, "pipeline_versions")

    def upload_version(self, pipeline_id: str, name: str, description: str, file: Path) -> V2beta1PipelineVersion:
        """A new version from a compiled file.

        Raises:
            Conflict: one of that name is there already.
        """
        return self._call(
            self._uploads.upload_pipeline_version,
            str(file),
            name=name,
            display_name=name,
            pipelineid=pipeline_id,
            description=description,
        )

    def experiment(self, name: str, namespace: str | None) -> V2beta1Experiment:
        """The experiment of that name, made where it is missing."""
        import kfp_server_api as api

        if found := self._find_experiment(name, namespace):
            return found
        try:
            return self._call(
                self._experiments.experiment_service_create_experiment,
                experiment=api.V2beta1Experiment(display_name=name, namespace=namespace),
            )
        except Conflict:  # somebody was faster
            if found := self._find_experiment(name, namespace):
                return found
            raise

    def create_run(self, run: V2beta1Run) -> V2beta1Run:
        """Start a run.

        Raises:
            ServerDown: nobody knows whether it was started.
        """
        try:
            started = self._call(self._runs.run_service_create_run, run=run)
        except ServerDown as error:
            raise ServerDown(f"{error} Look there for the run before you submit it again.") from None
        if not started.run_id:
            raise self._elsewhere("it names no run that it has started")
        return started

    def run(self, run_id: str) -> V2beta1Run:
        """A run with the details of its tasks."""
        return self._call(self._runs.run_service_get_run, run_id)

    def terminate(self, run_id: str) -> None:
        """Ask the server to cancel a run."""
        self._call(self._runs.run_service_terminate_run, run_id)

    def run_url(self, run_id: str) -> str:
        """Page of the run in the UI."""
        return f"{self.host}/#/runs/details/{run_id}"

    def _find_experiment(self, name: str, namespace: str | None) -> V2beta1Experiment | None:
        predicate = {"operation": "EQUALS", "key": "display_name", "string_value": name}
        given = {"filter": json.dumps({"predicates": [predicate]})} | ({"namespace": namespace} if namespace else {})

        def page(**kwargs: Any) -> Any:
            return self._experiments.experiment_service_list_experiments(**given, **kwargs)

        return next((e for e in self._pages(page, "experiments") if e.display_name == name), None)

    def _pages(self, method: Callable[..., Any], key: str) -> Iterator[Any]:
        token = ""
        while True:
            answer = self._call(method, page_size=PAGE, page_token=token)
            yield from getattr(answer, key) or []
            token = answer.next_page_token or ""
            if not token:
                return

    def _call(self, method: Callable[..., T], *args: Any, **kwargs: Any) -> T:
        from kfp_server_api import ApiException
        from urllib3.exceptions import HTTPError

        try:
            answer = method(*args, **kwargs, _request_timeout=TIMEOUT_SECONDS)
        except ApiException as error:
            raise self._explained(error.status, error.body or error.reason) from None
        except HTTPError as error:
            reason = self._without_token(str(getattr(error, "reason", None) or error))
            raise ServerDown(
                f"no answer: {reason}",
                where=self.host,
                do="Does --ca-cert name the authority's PEM file?"
                if "CERTIFICATE" in reason
                else "Is the URL right, and can this machine reach it?",
            ) from None
        except (ValueError, TypeError, AttributeError) as error:  # the client's own, of an answer that fits no model
            raise self._unreadable(type(error).__name__) from None
        text = self._client.last_response.data
        if not text.lstrip().startswith("{"):
            raise self._elsewhere("it answers with a page" if text.strip() else "it answers with nothing")
        try:
            json.loads(text)
        except ValueError:  # the client takes what is cut off for an answer without any values
            raise self._unreadable("it is no JSON") from None
        return answer

    def _unreadable(self, found: str) -> ServerDown:
        return ServerDown(f"the answer cannot be read: {found}", where=self.host)

    def _elsewhere(self, found: str) -> ConfigError:
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
            return self._elsewhere(f"it sends us elsewhere ({status})")
        kinds: dict[int, type[NvilaError]] = {404: _NotFound, 409: Conflict}
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


class Conflict(ConfigError):
    """Something of that name is there already."""


class _NotFound(ConfigError):
    pass


def patiently(call: Callable[[], T], seconds: float, told: Callable[[str], None], pause_seconds: float) -> T:
    """The call's result, tried again for so long while there is none; `told` gets a line of each new reason.

    A token that has expired is such a reason: it is renewed in its file, sooner or later. What is not there stays away.

    Raises:
        NvilaError: there was none for longer.
    """
    began = time.monotonic()
    last = ""
    while True:
        try:
            return call()
        except _NotFound:
            raise
        except NvilaError as error:
            if time.monotonic() - began > seconds:
                raise
            if str(error) != last:
                told(f"{str(error).rstrip('.')}; the run goes on, trying again")
                last = str(error)
            time.sleep(pause_seconds)


def _message(body: str | bytes | None) -> str:
    """The server's own sentence, in one line."""
    text = body.decode(errors="replace") if isinstance(body, bytes) else body or ""
    try:
        content = json.loads(text)
        text = str(content.get("message") or content.get("error") or text) if isinstance(content, dict) else text
    except ValueError:
        pass
    return plain(text)[:300] or "no reason given"


def plain(text: str) -> str:
    """One line of text from elsewhere, without what would move a terminal's cursor or change its colours."""
    return "".join(c for c in " ".join(text.split()) if c.isprintable())
