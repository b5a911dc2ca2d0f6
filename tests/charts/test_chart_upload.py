"""The chart's upload Job in a real pod: KFP's API is a stand-in, token and rights are the real API server's."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from places import Cluster, Place
from typer.testing import CliRunner

from nvila.components.contracts.pipelines import PIPELINES
from nvila.pipelines.cli import app
from nvila.pipelines.compile.package import resource_name

sys.path.append(str(Path(__file__).parents[1] / "pipelines"))
from kfp_stand_in import standing_in

pytestmark = pytest.mark.cluster
AUDIENCE = "pipelines.kubeflow.org"


def test_what_the_job_uploads_can_be_submitted(running: Place) -> None:
    """Address, token, rights, volumes and image fit together only in a pod; without it nothing can be started."""
    cluster, namespace = running.cluster, running.namespace
    with standing_in(cluster.address()) as kfp:
        kfp.multi_user, kfp.namespaces = True, {namespace}
        uploading = {"mode": "upload", "host": kfp.url, "namespace": namespace}
        running.release(pipelines=uploading, mlflow={"mode": "none"})
        (job,) = cluster.get("jobs", "-n", namespace)["items"]
        name = f"job/{job['metadata']['name']}"
        cluster.kubectl("wait", "--for=condition=complete", name, "-n", namespace, "--timeout=180s")
        (token,) = kfp.tokens
        user = _who(cluster, token)
        assert user["username"] == f"system:serviceaccount:{namespace}:nvila-upload"
        wanted = [(verb, part) for verb in ("get", "list", "create") for part in ("", "versions")]
        assert [one for one in wanted if not _may(cluster, user, namespace, *one)] == []
        assert not _may(cluster, user, namespace, "delete", "")

        names = {one["pipeline_id"]: one["name"] for one in kfp.pipelines}
        versions = {names[one["pipeline_id"]]: one for one in kfp.versions}
        assert {*versions} == {resource_name(name) for name in PIPELINES} and len(kfp.versions) == len(versions)
        ran = CliRunner().invoke(app, ["submit", "micro", "--host", kfp.url, "--namespace", namespace])
        assert ran.exit_code == 0, ran.output
        (run,) = kfp.runs
        assert (
            run["pipeline_version_reference"]["pipeline_version_id"]
            == versions[resource_name("lifecycle")]["pipeline_version_id"]
        )


def _who(cluster: Cluster, token: str) -> dict[str, Any]:
    """Whose token it is, asked as KFP asks."""
    status = cluster.ask("TokenReview", "authentication.k8s.io/v1", {"token": token, "audiences": [AUDIENCE]})
    assert status.get("authenticated") and status["audiences"] == [AUDIENCE], status
    return dict(status["user"])


def _may(cluster: Cluster, user: dict[str, Any], namespace: str, verb: str, part: str) -> bool:
    """Whether KFP would let this user do it to its pipelines or their versions."""
    what = {"group": AUDIENCE, "resource": "pipelines", "subresource": part, "verb": verb, "namespace": namespace}
    asked = {"user": user["username"], "groups": user["groups"], "resourceAttributes": what}
    return bool(cluster.ask("SubjectAccessReview", "authorization.k8s.io/v1", asked)["allowed"])
