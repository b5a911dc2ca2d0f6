"""What the controller sees of a namespace, from the lists that an API server gives."""

from __future__ import annotations

from typing import Any

import pytest
from serving_pods import BACK_OFF, Object, condition, container, ended, pod, ready, spec

from nvila.components.contracts.modelrollout import MODEL_LABEL
from nvila.components.kube.cluster import Cluster, Kind
from nvila.components.kube.errors import NotServed
from nvila.infra.controller.objects import (
    DEPLOYMENT,
    MODEL_ROLLOUT,
    ROUTE,
    SERVICE,
    Owner,
    Platform,
    champion_service,
    deployment,
    holds,
    route,
    service,
)
from nvila.infra.controller.seen import Registered
from nvila.infra.controller.watch import Looked, Watch

OWNER, PLATFORM = Owner("m", "n", "u"), Platform("i")


class Canned(Cluster):
    """Gives these lists."""

    def __init__(self, **lists: list[Object] | Exception) -> None:
        self.lists, self.asked = lists, list[str]()

    def find(self, kind: Kind, *, labels: str = "", **_: Any) -> list[Object]:
        assert labels == ("" if kind == MODEL_ROLLOUT else MODEL_LABEL)
        self.asked.append(kind.plural)
        found = self.lists.get(kind.plural, [])
        if isinstance(found, Exception):
            raise found
        return found


def looked(**lists: list[Object] | Exception) -> Looked:
    return Watch(Canned(**lists)).look()


def made(version: str, owner: Owner = OWNER, **changes: Any) -> Object:
    return deployment(owner, spec(**changes), Registered("m", version, digest="d"), PLATFORM)


def test_the_pods_of_a_version() -> None:
    """A pod that is told to go, or that another has replaced, would make a version look broken."""
    gone = ready("a", deleted=True, endpoint=container("endpoint", BACK_OFF, ended(1), 9))
    evicted = pod("b", phase="Failed", reason="Evicted", message="low on memory")
    pods = [evicted, gone, ready("c"), ready("d", version="1"), ready("e", rollout="other"), pod("f", phase="Pending")]
    found = looked(deployments=[made("2", pods={"replicas": 2}), made("1")], pods=pods)
    two = found.running("m", "2")
    assert [one.name for one in two.pods] == ["c", "f", "b"] and two.wanted == 2
    assert (two.ready, two.ended, two.trouble) == (False, 0, "NotReady")
    assert found.running("m", "1").ready and not found.running("m", "3").pods


def test_why_there_are_no_pods() -> None:
    """Without a pod only the Deployment can say that the quota is used up."""
    full = made("2") | {
        "status": {"conditions": [condition("ReplicaFailure", "True", "FailedCreate", "exceeded quota: x")]}
    }
    assert looked(deployments=[full]).running("m", "2").trouble == "Quota: exceeded quota: x"


def test_what_is_there_is_found_by_name_and_by_owner() -> None:
    """What another model has would be taken down, or what was left of a version stay for ever."""
    long = Owner("x" * 200, "n", "u")
    services = [service(OWNER, "1"), champion_service(OWNER, "1"), service(long, "1")]
    found = looked(
        deployments=[made("1"), made("1", long)], services=services, httproutes=[route(OWNER, spec(), "1", "", 0)]
    )
    assert holds(found.get(DEPLOYMENT, "m-v1"), made("1")) and found.get(DEPLOYMENT, "m-v2") is None
    assert [kind for kind, _ in found.of("m")] == [DEPLOYMENT, SERVICE, SERVICE, ROUTE]
    assert len(found.of("x" * 200)) == 2 and not found.of("x")
    assert found.running("x" * 200, "1").wanted == 1


def test_one_request_per_kind() -> None:
    """With a request per model, twenty models took longer than a round may."""
    cluster = Canned()
    Watch(cluster).look()
    assert sorted(cluster.asked) == ["deployments", "httproutes", "modelrollouts", "pods", "services"]


def test_without_the_gateway_api() -> None:
    """The loop would end at each round, and roll back nobody."""
    found = looked(deployments=[made("1")], pods=[ready("a", version="1")], httproutes=NotServed("no"))
    assert found.running("m", "1").ready and "HTTPRoute" in found.missing and found.refused("m") == found.missing
    with pytest.raises(NotServed):
        looked(modelrollouts=NotServed("no"))
    with pytest.raises(NotServed):
        looked(deployments=NotServed("no"))


def test_a_route_that_the_gateway_does_not_take() -> None:
    """Everything is well, and no request comes."""
    ours = route(OWNER, spec(), "1", "", 0)
    assert looked(httproutes=[ours]).refused("m") == looked().refused("m") == ""

    def parents(*conditions: Object) -> Object:
        return ours | {"status": {"parents": [{"parentRef": {"name": "g"}, "conditions": list(conditions)}]}}

    fine = condition("Accepted"), condition("ResolvedRefs")
    assert looked(httproutes=[parents(*fine)]).refused("m") == ""
    no = condition("Accepted", "False", "NotAllowedByListeners", "No listeners match")
    said = looked(httproutes=[parents(no)]).refused("m")
    assert said == "the Gateway does not take the HTTPRoute m: NotAllowedByListeners: No listeners match"


@pytest.mark.parametrize(("taken", "routed"), [((), True), ((3, 3), True), ((3, 2), False), ((2,), False)])
def test_a_route_counts_once_every_gateway_has_taken_it_as_it_is(taken: tuple[int, ...], routed: bool) -> None:
    """A Gateway that lagged behind sent requests to pods that were ended as if it had been told."""
    ours = route(OWNER, spec(), "2", "", 0)
    ours["metadata"]["generation"] = 3
    said = [{"conditions": [{"type": "Accepted", "status": "True", "observedGeneration": one}]} for one in taken]
    assert looked(httproutes=[ours | {"status": {"parents": said}}]).routed("m") is routed
    assert looked().routed("m")
