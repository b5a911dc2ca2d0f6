"""ModelRollouts on a real API server: what every account may do, what is refused, and what outlives the release."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import yaml
from helming import CHART
from places import Place, merged
from test_chart_security import RIGHTS

from nvila.components.contracts.modelrollout import API, GROUP, KIND, PLURAL

pytestmark = pytest.mark.cluster
CRD = f"{PLURAL}.{GROUP}"
TAKE = (CHART, "--take-ownership", "--force-conflicts")
"""The definition may be there from another test, or another release."""
ON: dict[str, Any] = {
    "controller": {"enabled": True, "gateway": {"name": "public"}},
    # The tests' folder has no definition of PodMonitor.
    "monitoring": {"serviceMonitor": False},
}
SPEC = {"model": "digits", "image": "registry.example/serve:1", "gateway": {"name": "public"}}
ACCOUNTS = {"nvila-controller", "nvila-mlflow", "nvila-postgres", "nvila-upload", "default"}
RUNS = ("pipeline-runner", "default-editor")
EVERYBODY = {"selfsubjectaccessreviews", "selfsubjectrulesreviews", "selfsubjectreviews"}


def _rights(place: Place, account: str, home: str, namespace: str) -> dict[str, set[str]]:
    """By resource, as the API server judges it; what everybody may is left out."""
    review = {"apiVersion": "authorization.k8s.io/v1", "kind": "SelfSubjectRulesReview"}
    given = yaml.safe_dump({**review, "spec": {"namespace": namespace}})
    who = f"--as=system:serviceaccount:{home}:{account}"
    said = place.cluster.kubectl("create", "--filename", "-", "--output", "json", who, given=given)
    found: dict[str, set[str]] = {}
    for rule in json.loads(said)["status"]["resourceRules"]:
        for resource in set(rule.get("resources", [])) - EVERYBODY:
            found.setdefault(resource, set()).update(rule["verbs"])
    return found


def _of(*roles: str) -> dict[str, set[str]]:
    found = defaultdict[str, set[str]](set)
    for role in roles:
        for resource, verbs in RIGHTS[role].items():
            found[resource] |= set(verbs)
    return dict(found)


def test_every_account_may_what_it_must_and_nothing_else(make_place: Callable[..., Place]) -> None:
    """Too few rights stop promotions at night; with too many a step skips the steps of a rollout, or reads Secrets."""
    place = make_place("team")
    upload = {"mode": "upload", "host": "http://127.0.0.1:9"}
    said = place.release(*TAKE, **ON, pipelines=upload, mlflow={"auth": {"enabled": True}})
    (team,) = place.extra
    home = place.namespace
    lacking = {line[12:].partition(":")[0] for line in said.splitlines() if line.startswith("  [missing]")}
    login = {f"MLFLOW_TRACKING_USERNAME in Secret {name}/nvila-credentials" for name in (home, team)}
    assert {f"Gateway {team}/public", f"Secret {home}/nvila-mlflow-auth", *login} <= lacking, said
    for account in ACCOUNTS:
        wanted = {
            ("nvila-controller", home): _of("nvila-controller-lease"),
            ("nvila-controller", team): _of("nvila-controller"),
            ("nvila-upload", home): _of("nvila-upload"),
        }
        for namespace in (home, team, "default"):
            found = _rights(place, account, home, namespace)
            assert found == wanted.get((account, namespace), {}), (account, namespace)
    for account in RUNS:
        assert _rights(place, account, team, team) == _of("nvila-launcher", "nvila-rollout")
        assert _rights(place, account, team, home) == {}
    assert _rights(place, "default", team, team) == {}, "the account of pods that serve"


@pytest.fixture
def served(make_place: Callable[..., Place]) -> Iterator[Place]:
    """A place with the definition, and a ModelRollout `digits`."""
    place = make_place()
    place.release(*TAKE, **ON)
    place.cluster.kubectl("wait", "--for", "condition=Established", f"crd/{CRD}", "--timeout", "30s")
    place.cluster.apply(_model(place, "digits", SPEC))
    yield place


def _model(place: Place, name: str, spec: dict[str, Any]) -> dict[str, Any]:
    return {"apiVersion": API, "kind": KIND, "metadata": {"name": name, "namespace": place.namespace}, "spec": spec}


def test_the_server_refuses_what_is_out_of_bounds(served: Place) -> None:
    """What the API server stores, the controller meets at its next round."""
    cluster = served.cluster
    for wrong, says in (
        ({"pods": {"replicas": 0}}, "spec.pods.replicas"),
        ({"policy": {"steps": [5, 101]}}, "spec.policy.steps"),
        ({"override": {"version": "newest", "reason": "x"}}, "spec.override.version"),
        ({"override": {"version": "7"}}, "spec.override.reason"),
        ({"model": "a model"}, "spec.model"),
        ({"paused": "yes"}, "spec.paused"),
    ):
        given = yaml.safe_dump(_model(served, "wrong", {**SPEC, **wrong}))
        said = cluster.kubectl("create", "--validate=false", "--filename", "-", given=given, check=False)
        assert says in said and "nvalid" in said, said
    # Kubernetes' own objects are stored as they are, and a null as well.
    whole = {"pods": {"tolerations": [{"key": "gpu", "operator": "Exists"}], "affinity": {"nodeAffinity": {"a": [1]}}}}
    cluster.apply(_model(served, "whole", {**SPEC, **whole, "override": None}))
    stored = cluster.get(CRD, "whole", "-n", served.namespace)["spec"]
    assert stored["pods"] == whole["pods"]


def test_a_line_tells_the_story(served: Place) -> None:
    """At night people look at `kubectl get mro` before anything else."""
    status = {
        "phase": "Shifting",
        "message": "version 8 gets 25% of the requests",
        "champion": {"version": "7", "digest": "d", "since": "2026-11-28T00:00:00Z"},
        "step": 2,
        "steps": 4,
        "weight": 25,
    }
    proxy = f"/apis/{API}/namespaces/{served.namespace}/{PLURAL}/digits"
    stored = json.loads(served.cluster.kubectl("get", "--raw", proxy))
    body = json.dumps({**stored, "status": status})
    served.cluster.kubectl("replace", "--raw", f"{proxy}/status", "--filename", "-", given=body)
    said = served.cluster.kubectl("get", "mro", "-n", served.namespace).splitlines()
    assert said[0].split() == ["NAME", "PHASE", "CHAMPION", "CHALLENGER", "STEP", "OF", "WEIGHT", "AGE", "MESSAGE"]
    assert said[1].split()[:6] == ["digits", "Shifting", "7", "2", "4", "25"]
    assert said[1].endswith(status["message"])


def test_models_outlive_the_release(served: Place, make_place: Callable[..., Place]) -> None:
    """Helm takes away what it made: with the definition every model of the cluster would stop being served."""
    served.uninstall()
    assert served.cluster.get("mro", "digits", "-n", served.namespace)["spec"] == SPEC
    other = make_place()
    with pytest.raises(AssertionError, match=rf'CustomResourceDefinition "{CRD}" .*cannot be imported'):
        other.release(**ON)
    other.release(**merged(ON, {"controller": {"definition": False}}))
    other.release(*TAKE, **ON)
    found = served.cluster.get("crd", CRD)["metadata"]["annotations"]
    assert found["meta.helm.sh/release-namespace"] == other.namespace
