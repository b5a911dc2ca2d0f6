"""A Kubeflow Pipelines API server (v2beta1) as `nvila submit`, `status` and `logs` need it: few calls."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nvila.pipelines.kubeflow.connection import Conflict, Connection, NotFound, ServerDown

if TYPE_CHECKING:
    from kfp_server_api import V2beta1Experiment, V2beta1Pipeline, V2beta1PipelineVersion, V2beta1Run

PAGE = 100
_LOG = "main-logs"
"""Argo's name of it."""


class Server:
    """One API server, over its connection."""

    def __init__(self, connection: Connection) -> None:
        import kfp_server_api as api

        self._connection, client = connection, connection.client
        self.host, self._call = connection.host, connection.call
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
            except NotFound:
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
            raise self._connection.elsewhere("it names no run that it has started")
        return started

    def run(self, run_id: str) -> V2beta1Run:
        """A run with the details of its tasks.

        Raises:
            NotFound: there is none of this id, or none any more.
        """
        try:
            return self._call(self._runs.run_service_get_run, run_id)
        except NotFound:
            raise NotFound(
                "there is no such run", where=self.host, value=run_id, do="Was it deleted, or is it another server's?"
            ) from None

    def log(self, run_id: str, node: str) -> str | None:
        """Log of a pod that has ended, as Argo has archived it; None where it has not.

        That is the one artifact that this API gives out: it knows no URI of KFP's own, and the `outputs` of its tasks
        are empty. The generated client has no method for it (KFP 2.17, backend/src/apiserver/main.go).

        Args:
            run_id: of the run.
            node: Argo's id of the node; with one that was tried again, the newest try answers.
        """
        path = {"run_id": run_id, "node_id": node, "artifact_name": _LOG}
        try:
            answer = self._call(
                self._connection.client.call_api,
                "/apis/v2beta1/runs/{run_id}/nodes/{node_id}/artifacts/{artifact_name}:read",
                "GET",
                path,
                header_params={"Accept": "application/json"},
                response_type="object",
                auth_settings=["Bearer"],
                _return_http_data_only=True,
            )
        except NotFound:
            return None
        return base64.b64decode(answer.get("data") or "").decode(errors="replace")

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
