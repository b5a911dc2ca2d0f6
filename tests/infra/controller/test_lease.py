"""Who has the lease, among machines whose clocks differ; the API server is played by a dictionary with versions."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nvila.components.kube.cluster import Cluster, Kind, Object
from nvila.components.kube.errors import Away, Conflict, NotThere
from nvila.infra.controller.lease import Lease

SECONDS = 15


class OneObject(Cluster):
    """Keeps one object, as an API server does."""

    def __init__(self) -> None:
        self.found: Object | None = None
        self.away = False
        self.version = 0

    def get(self, kind: Kind, name: str, patience: Any = None) -> Object | None:
        self.check()
        return copy.deepcopy(self.found)

    def create(self, kind: Kind, body: Any) -> Object:
        self.check()
        if self.found:
            raise Conflict("AlreadyExists")
        return self.write(copy.deepcopy(dict(body)))

    def patch(self, kind: Kind, name: str, change: Any, part: str = "") -> Object:
        self.check()
        if self.found is None:
            raise NotThere(name)
        if change["metadata"]["resourceVersion"] != self.found["metadata"]["resourceVersion"]:
            raise Conflict("changed")
        spec = {**self.found["spec"], **change["spec"]}
        return self.write({**self.found, "spec": {key: value for key, value in spec.items() if value is not None}})

    def write(self, found: Object) -> Object:
        self.version += 1
        self.found = found | {"metadata": {"name": "l", "resourceVersion": str(self.version)}}
        return self.found

    def check(self) -> None:
        if self.away:
            raise Away("away")


class Clock:
    """Of one machine; it began at a time of its own."""

    def __init__(self, began: float) -> None:
        self.now = began

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def cluster() -> OneObject:
    return OneObject()


def holders(cluster: OneObject, *began: float) -> list[tuple[Lease, Clock]]:
    clocks = [Clock(one) for one in began]
    return [(Lease(cluster, "l", f"h{n}", SECONDS, clock), clock) for n, clock in enumerate(clocks)]


def pass_time(seconds: float, *clocks: Clock) -> None:
    for clock in clocks:
        clock.now += seconds


def test_the_next_one_waits_until_it_has_run_out(cluster: OneObject) -> None:
    """Two controllers roll out two versions; a minute between two machines' clocks must not make it so."""
    (first, a), (second, b) = holders(cluster, 1000, 5)
    assert first.held() and not second.held()
    for _ in range(10):
        pass_time(10, a, b)
        assert first.held() and not second.held() and first.valid
    pass_time(SECONDS - 0.1, a, b)
    assert first.valid and not second.held()
    pass_time(0.2, a, b)
    assert not first.valid and second.held() and not first.held()
    assert cluster.found and cluster.found["spec"]["leaseTransitions"] == 1


def test_it_is_given_back(cluster: OneObject) -> None:
    """An upgrade would stop all rollouts for as long as the lease lasts."""
    (first, _), (second, _) = holders(cluster, 0, 0)
    assert first.held() and not second.held()
    first.release()
    assert not first.valid and second.held() and not first.held()
    first.release()
    assert second.valid and second.held()


def test_a_slow_answer_counts_from_the_question(cluster: OneObject) -> None:
    """A request that takes ten seconds leaves five."""
    ((lease, clock),) = holders(cluster, 0)
    get = cluster.get

    def slow(*arguments: Any) -> Object | None:
        found = get(*arguments)
        pass_time(10, clock)
        return found

    cluster.get = slow  # type: ignore[method-assign]
    assert lease.held() and lease.valid
    pass_time(5, clock)
    assert not lease.valid


def test_while_the_api_server_is_away_it_lasts_as_long_as_it_did(cluster: OneObject) -> None:
    """A controller that acts for ever on an old answer is a second one as soon as another gets the lease."""
    ((lease, clock),) = holders(cluster, 0)
    assert lease.held()
    cluster.away = True
    with pytest.raises(Away):
        lease.held()
    assert lease.valid
    pass_time(SECONDS, clock)
    assert not lease.valid
    lease.release()


def test_somebody_elses_change_takes_nothing_away(cluster: OneObject) -> None:
    """An annotation by hand between our reading and our writing."""
    ((lease, clock),) = holders(cluster, 0)
    assert lease.held()
    get = cluster.get

    def changed(*arguments: Any) -> Object | None:
        found = get(*arguments)
        cluster.write(cluster.found or {})
        return found

    cluster.get = changed  # type: ignore[method-assign]
    assert lease.held()
    pass_time(SECONDS, clock)
    assert not lease.held()


actions = st.lists(
    st.tuples(st.integers(0, 2), st.sampled_from(["held", "held", "held", "release"]), st.floats(0, 12)), max_size=40
)


@given(actions, st.lists(st.floats(0, 1e6), min_size=3, max_size=3))
def test_at_most_one_believes_to_have_it(todo: list[tuple[int, str, float]], began: list[float]) -> None:
    """In whatever order they ask, stop and come back."""
    of = holders(OneObject(), *began)
    for who, what, seconds in todo:
        getattr(of[who][0], what)()
        assert sum(lease.valid for lease, _ in of) <= 1
        pass_time(seconds, *(clock for _, clock in of))
        assert sum(lease.valid for lease, _ in of) <= 1
