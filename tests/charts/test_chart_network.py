"""Who may talk to whom: every NetworkPolicy's selectors and ports, held against the pods that there are."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from helming import EVERYTHING, Document, pod_templates, render, serving_pod
from policies import Pod, allowed, fits, matches, peers, selects

from nvila.components.contracts.modelrollout import HTTP_PORT, METRICS_PORT

NAMESPACES = ("nvila", "team-a", "team-b")
API, DNS = 6443, 53
OUTSIDE = Pod()
OTHERS = {
    "step": Pod("team-a"),
    "stranger": Pod("shop"),
    "gateway": Pod("gateways"),
    "prometheus": Pod("monitoring"),
    "dns": Pod("kube-system", {"k8s-app": "kube-dns"}),
    "store": Pod("example"),
    "outside": OUTSIDE,
}
"""What the chart does not make. The S3 store's address is that of a Service, in the namespace `example`."""


def _serving(namespace: str) -> Pod:
    made = serving_pod(namespace)
    ports = tuple(port["containerPort"] for port in made["spec"]["containers"][0]["ports"])
    return Pod(namespace, made["metadata"]["labels"], ports)


def _pods(documents: Sequence[Document]) -> dict[str, Pod]:
    """By component; those of a namespace of runs with its last letter."""
    found = dict(OTHERS)
    for document, template in pod_templates(documents):
        labels = template["metadata"]["labels"]
        ports = tuple(p["containerPort"] for c in template["spec"]["containers"] for p in c.get("ports", []))
        name = labels["app.kubernetes.io/component"]
        if document["kind"] == "ClusterTrainingRuntime":
            found |= {f"{name}-{team[-1]}": Pod(team, labels, ports) for team in NAMESPACES[1:]}
        else:
            found[name] = Pod(NAMESPACES[0], labels, ports)
    return found | {f"serving-{team[-1]}": _serving(team) for team in NAMESPACES[1:]}


def _policies(documents: Sequence[Document]) -> list[Document]:
    here = {"namespace": NAMESPACES[0]}
    return [{**d, "metadata": here | d["metadata"]} for d in documents if d["kind"] == "NetworkPolicy"]


@pytest.fixture(scope="module")
def documents() -> list[Document]:
    return render(EVERYTHING)


@pytest.fixture(scope="module")
def policies(documents: list[Document]) -> list[Document]:
    return _policies(documents)


WANTED = [
    ("step", "mlflow", 5000),
    ("prometheus", "mlflow", 5000),
    ("mlflow", "postgres", 5432),
    ("backup", "postgres", 5432),
    *((pod, "store", 8333) for pod in ("mlflow", "backup", "warmup", "serving-a", "controller")),
    ("warmup", "outside", 443),
    ("training-a", "training-a", 29500),
    ("controller", "mlflow", 5000),
    *(("controller", f"serving-{team}", port) for team in "ab" for port in (HTTP_PORT, METRICS_PORT)),
    ("controller", "outside", API),
    ("controller", "outside", 443),
    ("serving-b", "mlflow", 5000),
    ("serving-a", "serving-a", HTTP_PORT),
    ("serving-a", "outside", 443),
    ("gateway", "serving-a", HTTP_PORT),
    ("prometheus", "serving-b", METRICS_PORT),
    ("prometheus", "controller", 8080),
]
REFUSED = [
    ("stranger", "mlflow", 5000),
    *((pod, "postgres", 5432) for pod in ("step", "controller", "serving-a", "warmup", "outside")),
    ("mlflow", "outside", 443),
    ("backup", "mlflow", 5000),
    ("training-a", "training-b", 29500),
    ("step", "training-a", 29500),
    *((pod, "serving-a", HTTP_PORT) for pod in ("step", "stranger", "prometheus", "serving-b", "outside")),
    *((pod, "serving-a", METRICS_PORT) for pod in ("step", "gateway", "serving-a", "outside")),
    *((pod, "controller", 8080) for pod in ("step", "gateway", "serving-a", "outside")),
    ("prometheus", "controller", 443),
    ("controller", "outside", 25),
    ("serving-a", "outside", API),
    ("serving-a", "outside", 80),
    ("mlflow", "serving-a", HTTP_PORT),
    *(("step", pod, 80) for pod in ("upload", "warmup", "backup")),
]


@pytest.mark.parametrize(("source", "target", "port"), WANTED)
def test_who_has_to_talk_may(source: str, target: str, port: int, documents: list, policies: list) -> None:
    """A policy that is too tight shows as requests that hang, on clusters whose network plugin enforces it alone."""
    pods = _pods(documents)
    assert allowed(policies, pods[source], pods[target], port)


@pytest.mark.parametrize(("source", "target", "port"), REFUSED)
def test_nobody_else_may(source: str, target: str, port: int, documents: list, policies: list) -> None:
    """A database, a metric or an endpoint behind its Gateway that every pod of the cluster can reach."""
    pods = _pods(documents)
    assert not allowed(policies, pods[source], pods[target], port)


def test_names_can_be_looked_up(documents: list[Document], policies: list[Document]) -> None:
    """Without DNS each of these pods waits half a minute, then fails with a name that exists."""
    pods = _pods(documents)
    for name in ("mlflow", "backup", "warmup", "controller", "serving-a"):
        for protocol in ("UDP", "TCP"):
            assert allowed(policies, pods[name], pods["dns"], DNS, protocol), name


def test_every_selector_matches_a_pod(documents: list[Document], policies: list[Document]) -> None:
    """A policy of a misspelt label protects nothing, and a peer of one lets nobody in."""
    pods = _pods(documents)
    assert len(policies) > 8
    for policy in policies:
        name, home = policy["metadata"]["name"], policy["metadata"]["namespace"]
        mine = [pod for pod in pods.values() if selects(policy, pod)]
        assert mine, name
        for peer in peers(policy):
            if "ipBlock" not in peer:
                assert any(matches(peer, pod, home) for pod in pods.values()), (name, peer)
        ports = {port for pod in mine for port in pod.ports}
        opened = {one["port"] for rule in policy["spec"].get("ingress") or [] for one in rule.get("ports", [])}
        assert opened <= ports, f"{name} opens a port that nothing listens on"


def test_endpoints_are_open_where_no_gateway_is_named() -> None:
    """Where the proxies of a Gateway run is not known from its name: a default that named one would lock users out."""
    found = _policies(render(EVERYTHING, sets=["networkPolicies.gateways=[]", "networkPolicies.media=[]"]))
    for source in (OUTSIDE, Pod("anywhere")):
        assert allowed(found, source, _serving("team-a"), HTTP_PORT)
        assert not allowed(found, source, _serving("team-a"), METRICS_PORT)
    assert not allowed(found, _serving("team-a"), OUTSIDE, 443)


def test_an_external_registry_is_reached_by_its_port() -> None:
    """The controller and the pods that fetch weights would wait for a server of the chart that there is not."""
    own = ['mlflow.mode="external"', "mlflow.auth.enabled=false"]
    sets = [*own, 'mlflow.uri="https://mlflow.example.org:8443/team"']
    documents = render(EVERYTHING, sets=sets)
    found = _policies(documents)
    for pod in (_pods(documents)["controller"], _serving("team-a")):
        assert allowed(found, pod, OUTSIDE, 8443) and not allowed(found, pod, OUTSIDE, 5000)


def test_the_reader_of_policies_can_say_no() -> None:
    """Otherwise everything above would hold of any policy."""
    assert not fits({"matchLabels": {"a": "b"}}, {"a": "c"}) and fits({}, {"a": "c"})
    policy = {"metadata": {"namespace": "x"}, "spec": {"podSelector": {}, "policyTypes": ["Ingress"], "ingress": []}}
    assert not allowed([policy], OUTSIDE, Pod("x"), 80) and allowed([policy], Pod("x"), OUTSIDE, 80)
