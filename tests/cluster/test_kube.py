"""What a controller builds on, on a real API server: apply, status, leases, a watch, and the discovery of kinds."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
from kube import wait_for

from nvila.components.kube.cluster import CONFIG_MAP, NAMESPACE, Cluster, Kind, Object
from nvila.components.kube.connect import connect
from nvila.components.kube.errors import Conflict, NotServed, NotThere, Refused
from nvila.components.kube.requests import Patience, Requests
from nvila.infra.launch.jobs import TRAIN_JOB

LEASE = Kind("coordination.k8s.io/v1", "Lease", "leases")


@pytest.fixture
def here(namespaced: Path) -> Cluster:
    """The test's namespace, without any definitions of ours."""
    return Cluster(Requests(connect(str(namespaced)), Patience(contact_seconds=10, denied_seconds=1)))


def _config(**data: str | None) -> Object:
    return {"metadata": {"name": "c"}, "data": data}


def test_what_is_applied_is_ours_and_only_that(here: Cluster) -> None:
    """A controller that overwrites a whole object undoes what people have set; one that forgets keeps old fields."""
    here.apply(CONFIG_MAP, _config(weight="5", paused="no"), owner="controller")
    here.patch(CONFIG_MAP, "c", {"data": {"paused": "yes", "note": "by hand"}})
    assert here.apply(CONFIG_MAP, _config(weight="25"), owner="controller")["data"] == {
        "weight": "25",
        "paused": "yes",
        "note": "by hand",
    }
    with pytest.raises(Conflict, match=r"paused|conflict"):
        here.apply(CONFIG_MAP, _config(paused="no"), owner="controller")
    found = here.apply(CONFIG_MAP, _config(paused="no"), owner="controller", force=True)
    assert found["data"] == {"paused": "no", "note": "by hand"}, "what the owner says no more goes"


def test_one_of_two_holders_gets_a_lease(here: Cluster) -> None:
    """Two controllers that both believe to be the only one roll out two versions."""

    def held(by: str, version: str = "") -> Object:
        metadata: dict[str, Any] = {"name": "controller"} | ({"resourceVersion": version} if version else {})
        return {"metadata": metadata, "spec": {"holderIdentity": by, "leaseDurationSeconds": 15}}

    first = here.create(LEASE, held("a"))["metadata"]["resourceVersion"]
    with pytest.raises(Conflict):
        here.create(LEASE, held("b"))
    here.apply(LEASE, held("b", first), owner="b", force=True)
    with pytest.raises(Conflict):
        here.apply(LEASE, held("a", first), owner="a", force=True)
    lease = here.get(LEASE, "controller")
    assert lease and lease["spec"]["holderIdentity"] == "b"


def test_a_status_is_written_beside_what_people_decide(cluster: Cluster) -> None:
    """A status that is written with the object is dropped without a word, and a decision is lost with it."""
    ours = {"runtimeRef": {"name": "nvila-torch"}}
    cluster.create(TRAIN_JOB, {"metadata": {"name": "j"}, "spec": ours})
    condition = {
        "type": "Suspended", "status": "True", "reason": "Test", "message": "m",
        "lastTransitionTime": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }  # fmt: skip
    body = {"metadata": {"name": "j"}, "status": {"conditions": [condition]}}
    found = cluster.apply(TRAIN_JOB, body, "controller", "status")
    assert found["status"]["conditions"][0]["message"] == "m" and found["spec"]["runtimeRef"]["name"] == "nvila-torch"
    changed = cluster.patch(TRAIN_JOB, "j", {"status": {"conditions": []}}, "status")
    assert changed["status"] == {"conditions": []}


def test_a_watch_tells_of_changes_and_ends_by_itself(here: Cluster) -> None:
    """A loop that waits for a change that it has missed stands still for ever."""
    made = here.create(CONFIG_MAP, _config(a="1"))
    here.patch(CONFIG_MAP, "c", {"data": {"a": "2"}})
    began = time.monotonic()
    events = list(here.watch(CONFIG_MAP, made["metadata"]["resourceVersion"], 2, fields="metadata.name=c"))
    assert [(kind, found["data"]["a"]) for kind, found in events] == [("MODIFIED", "2")]
    assert 1 < time.monotonic() - began < 10


def test_a_deletion_is_of_the_object_that_was_meant(here: Cluster) -> None:
    """The object of this name may be another one by now."""
    metadata = here.create(CONFIG_MAP, _config(a="1"))["metadata"]
    here.patch(CONFIG_MAP, "c", {"data": {"a": "2"}})
    with pytest.raises(Conflict):
        here.delete(CONFIG_MAP, "c", metadata["uid"], metadata["resourceVersion"])
    newest = (here.get(CONFIG_MAP, "c") or {})["metadata"]
    here.delete(CONFIG_MAP, "c", newest["uid"], newest["resourceVersion"])
    wait_for(lambda: here.get(CONFIG_MAP, "c") is None, "it stays")
    here.delete(CONFIG_MAP, "c", newest["uid"], newest["resourceVersion"])  # gone is what was wanted


def test_every_refusal_has_its_own_name(here: Cluster) -> None:
    """A missing object, a missing kind and a missing namespace are three answers of the number 404."""
    assert here.get(NAMESPACE, "no-such-namespace") is None
    with pytest.raises(NotThere):
        here.patch(CONFIG_MAP, "c", {"data": {}})
    with pytest.raises(NotServed, match=r"does not know /apis/nowhere\.example/v1"):
        here.find(Kind("nowhere.example/v1", "Nothing", "nothings"))
    with pytest.raises(Refused, match="Not A Name"):
        here.create(CONFIG_MAP, {"metadata": {"name": "Not A Name"}})
    assert here.served_version("apps", "deployments") == "apps/v1"
    assert here.served_version("apps", "nothings") is None
    assert here.served_version("nowhere.example", "nothings") is None
