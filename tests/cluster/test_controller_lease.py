"""The controllers' lease and what they apply, on a real API server."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from nvila.components.contracts.modelrollout import MANAGER, Spec
from nvila.components.kube.cluster import Cluster
from nvila.components.kube.connect import connect
from nvila.components.kube.requests import Patience, Requests
from nvila.infra.controller.lease import Lease
from nvila.infra.controller.objects import (
    DEPLOYMENT,
    SERVICE,
    Owner,
    Platform,
    champion_service,
    deployment,
    holds,
    service,
)
from nvila.infra.controller.seen import Registered

SPEC = {
    "model": "m",
    "image": "i",
    "gateway": {"name": "g"},
    "pods": {"gpus": 2, "cpu": "0.5", "memory": "1024Mi", "nodeSelector": {"a": "b"}},
}


@pytest.fixture
def here(namespaced: Path) -> Cluster:
    """The test's namespace."""
    return Cluster(Requests(connect(str(namespaced)), Patience.within(5)))


def test_one_of_several_has_the_lease(here: Cluster) -> None:
    """Two that roll out two versions; a lease that the API server refuses would stop all of them."""
    first, second = (Lease(here, "controller", who, seconds=2) for who in ("a", "b"))
    assert first.held() and not second.held() and first.held() and not second.held()
    first.release()
    assert second.held() and not first.held()
    until = time.monotonic() + 20
    while not first.held():  # the second one says no more
        assert time.monotonic() < until
        time.sleep(0.2)
    assert not second.held()


def test_what_was_applied_holds_and_what_is_wanted_no_more_goes(here: Cluster) -> None:
    """Defaults and quantities as the API server writes them: a loop would apply everything in every round."""
    owner, version, platform = Owner("m", here.namespace, "0d6e"), Registered("m", "2", digest="d" * 64), Platform("i")
    wanted = deployment(owner, Spec.model_validate(SPEC), version, platform)
    for kind, body in ((DEPLOYMENT, wanted), (SERVICE, service(owner, "2")), (SERVICE, champion_service(owner, ""))):
        # An owner that is not there: the garbage collector would take it.
        body["metadata"].pop("ownerReferences")
        stored = here.apply(kind, body, MANAGER, force=True)
        assert holds(stored, body), body["metadata"]["name"]
    later = deployment(owner, Spec.model_validate(SPEC | {"pods": {"gpus": 0}}), version, platform)
    later["metadata"].pop("ownerReferences")
    assert not holds(here.get(DEPLOYMENT, "m-v2"), later)
    stored = here.apply(DEPLOYMENT, later, MANAGER, force=True)
    assert holds(stored, later) and "nodeSelector" not in stored["spec"]["template"]["spec"]
