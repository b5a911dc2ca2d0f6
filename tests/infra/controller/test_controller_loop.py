"""The loop that acts: killed at every single request of a promotion and a rollback, it ends where it would have."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from nvila.components.contracts.errors import ConfigError, NvilaError
from nvila.components.contracts.modelrollout import MODEL_LABEL, VERSION_LABEL, Status
from nvila.components.kube.cluster import EVENT, POD, Kind, Object
from nvila.components.kube.errors import Conflict
from nvila.components.rollout.policy import Asked, Counters
from nvila.infra.controller import loop, objects
from nvila.infra.controller.loop import Controller
from nvila.infra.controller.objects import DEPLOYMENT, MODEL_ROLLOUT, ROUTE, SERVICE, Platform
from nvila.infra.controller.seen import Aliases, Registered, Running

SPEC: Object = {
    "model": "m",
    "image": "i",
    "gateway": {"name": "g"},
    "policy": {"pinnedPrompts": 4, "steps": [25, 100], "minRequests": 4, "minSeconds": 2, "drainSeconds": 3},
}


class Killed(BaseException):
    """kill -9: nothing after it happens."""


class Site:
    """A cluster and a registry that keep what they are told, and count the requests that change something."""

    namespace = name = "models"

    def __init__(self) -> None:
        self.stored: dict[tuple[str, str], Object] = {}
        self.aliases = Aliases()
        self.tags: dict[str, str] = {}
        self.versions, self.bad, self.errors = itertools.count(1), set[str](), set[str]()
        self.unreached = set[str]()
        self.killed_at, self.changes = -1, 0
        self.now = 1_790_000_000.0
        self.away: NvilaError | None = None
        self.counted: dict[str, Counters] = {}
        self.questions: dict[str, Asked] = {}
        self.log: list[str] = []
        self.seen_weights: list[tuple[str, int]] = []
        self.create(MODEL_ROLLOUT, {"metadata": {"name": "mine"}, "spec": SPEC})

    def change(self, what: str) -> None:
        if self.changes == self.killed_at:
            self.killed_at = -1
            raise Killed
        self.changes += 1
        self.log.append(what)

    # Of `Cluster`

    def create(self, kind: Kind, body: Object) -> Object:
        name = body["metadata"].get("name") or f"{body['metadata']['generateName']}{next(self.versions)}"
        meta = {**body["metadata"], "name": name, "namespace": self.namespace, "uid": f"uid-{name}", "generation": 1}
        meta |= {"resourceVersion": str(next(self.versions)), "creationTimestamp": "2026-01-01T00:00:00Z"}
        self.stored[kind.name, name] = {**body, "metadata": meta}
        return self.stored[kind.name, name]

    def find(self, kind: Kind, *, labels: str = "", fields: str = "", patience: Any = None) -> list[Object]:
        if kind == POD:
            return [self.pod(one) for (of, _), one in self.stored.items() if of == DEPLOYMENT.name]
        return [json.loads(json.dumps(one)) for (of, _), one in self.stored.items() if of == kind.name]

    def get(self, kind: Kind, name: str, patience: Any = None) -> Object | None:
        return self.stored.get((kind.name, name))

    def apply(self, kind: Kind, body: Object, owner: str, *, force: bool = False) -> Object:
        self.change(f"apply {kind.name}")
        found = self.stored.get((kind.name, name := body["metadata"]["name"]))
        if found is None:
            return self.create(kind, body)
        meta = {**found["metadata"], "resourceVersion": str(next(self.versions))}
        meta |= {key: body["metadata"][key] for key in ("labels", "annotations") if key in body["metadata"]}
        self.stored[kind.name, name] = {**found, **body, "metadata": meta}
        return self.stored[kind.name, name]

    def replace(self, kind: Kind, body: Object, part: str) -> Object:
        self.change(f"replace {kind.name} {part}")
        found = self.stored[kind.name, name := body["metadata"]["name"]]
        if body["metadata"]["resourceVersion"] != found["metadata"]["resourceVersion"]:
            raise Conflict("changed meanwhile")
        meta = {**found["metadata"], "resourceVersion": str(next(self.versions))}
        self.stored[kind.name, name] = {**found, "metadata": meta, part: body[part]}
        return self.stored[kind.name, name]

    def delete(self, kind: Kind, name: str, uid: str, version: str, patience: Any = None) -> None:
        self.change(f"delete {kind.name} {name}")
        self.stored.pop((kind.name, name), None)

    def pod(self, deployment: Object) -> Object:
        labels = deployment["metadata"]["labels"]
        meta = {"name": f"pod-{labels[VERSION_LABEL]}", "labels": labels}
        ready = "False" if f"unready {labels[VERSION_LABEL]}" in self.bad else "True"
        conditions = [{"type": "Ready", "status": ready}]
        return {
            "metadata": meta,
            "spec": {},
            "status": {"podIP": "10.0.0.1", "phase": "Running", "conditions": conditions},
        }

    # Of `Registry`

    def all_aliases(self) -> dict[str, Aliases]:
        if self.away:
            raise self.away
        return {"m": self.aliases}

    def version(self, model: str, number: str) -> Registered | None:
        return Registered(model, number, f"digest-{number}", "pinned")

    def point(self, model: str, alias: str, version: str) -> None:
        self.change(f"{alias} -> {version}")
        self.aliases = Aliases(**{**vars(self.aliases), alias: version})

    def drop(self, model: str, alias: str) -> None:
        self.point(model, alias, "")

    def tag(self, model: str, version: str, key: str, text: str) -> None:
        self.change(f"tag {version}")
        self.tags[version] = text

    # Of the world

    @property
    def status(self) -> Status:
        return Status.model_validate(self.stored[MODEL_ROLLOUT.name, "mine"].get("status") or {})

    @property
    def shares(self) -> dict[str, int]:
        """What the stored route gives each version."""
        backends = self.stored[ROUTE.name, "mine"]["spec"]["rules"][-1]["backendRefs"]
        return {one["name"].rpartition("-v")[2]: one["weight"] for one in backends}

    @property
    def runs(self) -> set[str]:
        return {
            one["metadata"]["labels"][VERSION_LABEL] for (kind, _), one in self.stored.items() if kind == "Deployment"
        }

    def users(self) -> None:
        for version, share in self.shares.items():
            n = 40 * share // 100
            made = Counters(requests=n, errors=n if version in self.errors else 0)
            self.counted[version] = self.counted.get(version, Counters()) + made
            self.seen_weights.append((version, share))


class RegistryOf:
    def __init__(self, site: Site) -> None:
        self.aliases, self.version, self.point = site.all_aliases, site.version, site.point
        self.drop, self.tag = site.drop, site.tag


class LeaseOf:
    valid = True

    def held(self) -> bool:
        return True


class AskingOf:
    """Answers at once, as long as the process lives that asked."""

    def __init__(self, site: Site) -> None:
        self.site, self.kept = site, dict[str, Asked]()

    def begin(self, key: str, registered: Registered, number: str, *_: Any) -> None:
        right = 0 if number in self.site.bad else 4
        self.kept[key] = Asked(asked=4, agreed=right, right=right)

    def one(self, *_: Any) -> None:
        pass

    def answer(self, key: str) -> Asked | None:
        return self.kept.get(key)

    def forget(self, key: str) -> None:
        self.kept.pop(key, None)


@pytest.fixture
def site(monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    yield from _site(monkeypatch)


def _site(monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    made = Site()

    def scrape(running: dict[tuple[str, str], Running]) -> dict[tuple[str, str], Running]:
        return {
            key: Running(tuple(_counted(pod, made.counted.get(key[1])) for pod in one.pods), one.wanted, one.why)
            for key, one in running.items()
        }

    monkeypatch.setattr(loop, "scrape", scrape)
    monkeypatch.setattr(loop, "reaches", lambda service: service["metadata"]["name"] not in made.unreached)
    monkeypatch.setattr(loop.time, "time", lambda: made.now)
    yield made


def _counted(pod: Any, counted: Counters | None) -> Any:
    from dataclasses import replace

    return replace(pod, counted=counted)


def controller(site: Site) -> Controller:
    return Controller([site], RegistryOf(site), LeaseOf(), Platform("fetch"), asking=AskingOf(site))  # type: ignore[arg-type, list-item]


def settle(site: Site, there: Callable[[], bool] = lambda: False, rounds: int = 60) -> None:
    """Rounds of a second each; a controller that was killed is started again."""
    one = controller(site)
    for _ in range(rounds):
        if there():
            return
        try:
            one.round()
        except Killed:
            one = controller(site)
        if ("HTTPRoute", "mine") in site.stored:
            site.users()
        site.now += 1


def story(site: Site, bad: bool) -> None:
    """Version 1 serves; version 2 is wanted, and fails its users where it is bad."""
    site.aliases = Aliases(challenger="1")
    settle(site, lambda: site.aliases == Aliases(champion="1"))
    site.changes, site.errors = 0, {"2"} if bad else set()
    site.aliases = Aliases(challenger="2", champion="1")
    settle(site)


@pytest.mark.parametrize("bad", [False, True], ids=["good", "bad"])
def test_killed_at_any_request_it_ends_in_the_same_place(bad: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A controller that was killed between two of its requests left two versions serving, or an alias that lied."""
    for whole in _site(monkeypatch):
        story(whole, bad)
        requests = whole.changes
        assert requests > 12
    for at in range(requests):
        for site in _site(monkeypatch):
            site.aliases = Aliases(challenger="1")
            settle(site, lambda site=site: site.aliases == Aliases(champion="1"))
            site.changes, site.killed_at, site.errors = 0, at, {"2"} if bad else set()
            site.aliases = Aliases(challenger="2", champion="1")
            settle(site)
            wins = "1" if bad else "2"
            assert site.killed_at == -1 and site.runs == {wins} and site.shares == {wins: 100}, (at, site.log)
            assert site.aliases == (Aliases(champion="1") if bad else Aliases(champion="2", previous="1")), at
            assert site.status.champion and site.status.champion.version == wins and not site.status.pending
            verdicts = [one.verdict for one in site.status.decisions if one.version == "2"]
            assert verdicts == (["rolled back"] if bad else ["promoted"]), (at, verdicts)
            assert "2" in site.tags and (not bad or max(s for v, s in site.seen_weights if v == "2") == 25)


def test_a_round_in_which_nothing_is_to_be_done_changes_nothing(site: Site) -> None:
    """Twenty idle models wrote eighty objects every two seconds."""
    story(site, bad=False)
    before = site.changes
    settle(site, rounds=5)
    assert site.changes == before


def test_what_people_change_by_hand_is_made_as_it_was(site: Site) -> None:
    """Somebody deleted the Deployment, or moved the weights in the route, and it stayed so."""
    story(site, bad=False)
    del site.stored[DEPLOYMENT.name, "mine-v2"]
    site.stored[ROUTE.name, "mine"]["spec"]["rules"][-1]["backendRefs"][0]["name"] = "mine-v1"
    site.stored[SERVICE.name, "mine-champion"]["spec"]["selector"][VERSION_LABEL] = "1"
    settle(site, rounds=1)
    assert site.runs == {"2"} and site.shares == {"2": 100}
    assert site.stored[SERVICE.name, "mine-champion"]["spec"]["selector"] == {MODEL_LABEL: "mine", VERSION_LABEL: "2"}


def test_weight_0_is_stored_before_anything_else(site: Site) -> None:
    """The registry was asked first, and while it was slow the users went on getting errors."""
    site.aliases = Aliases(challenger="1")
    settle(site, lambda: site.aliases == Aliases(champion="1"))
    site.aliases = Aliases(challenger="2", champion="1")
    settle(site, lambda: site.shares.get("2") == 25)
    site.errors, site.log = {"2"}, []
    settle(site, lambda: site.shares == {"1": 100}, rounds=6)
    assert site.log[-6:][0] == "apply HTTPRoute" or "apply HTTPRoute" in site.log
    first = site.log.index("apply HTTPRoute")
    assert not any("challenger" in one or "tag" in one or "delete" in one for one in site.log[:first])


def test_a_registry_that_refuses_does_not_hold_up_requests_and_pods(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An account without the right to move an alias: nothing of the decision came true, and nobody was told why."""
    site.aliases = Aliases(challenger="1")
    settle(site, lambda: site.aliases == Aliases(champion="1"))

    def refuse(*_: str) -> None:
        raise ConfigError("this user may not do it")

    monkeypatch.setattr(site, "point", refuse)
    monkeypatch.setattr(site, "tag", refuse)
    site.aliases = Aliases(challenger="2", champion="1")
    settle(site)
    assert site.shares == {"2": 100} and site.runs == {"2"} and site.aliases.champion == "1"
    assert site.status.pending and "has not taken what was decided" in site.status.message


def test_without_a_login_at_the_registry_a_version_that_fails_is_rolled_back(site: Site) -> None:
    """A password had expired: the loop ended each round before it had looked at a single model."""
    site.aliases = Aliases(challenger="1")
    settle(site, lambda: site.aliases == Aliases(champion="1"))
    site.aliases = Aliases(challenger="2", champion="1")
    settle(site, lambda: site.shares.get("2") == 25)
    site.away, site.errors = ConfigError("401"), {"2"}
    settle(site, rounds=6)
    assert site.shares == {"1": 100} and "does not answer" in site.status.message


def test_one_model_that_cannot_be_read_does_not_hold_up_the_others(site: Site) -> None:
    """A status that somebody edited by hand ended the loop of all models."""
    broken = site.create(MODEL_ROLLOUT, {"metadata": {"name": "a"}, "spec": SPEC | {"model": "other"}})
    broken["status"] = {"champion": {"version": ["?"]}}
    story(site, bad=False)
    assert site.shares == {"2": 100} and site.aliases.champion == "2"


def test_a_round_that_takes_longer_than_the_lease_asks_for_it_again(site: Site) -> None:
    """With twenty models a round outlasted the Lease: it refused its own writes, or two controllers acted at a time."""
    site.create(MODEL_ROLLOUT, {"metadata": {"name": "other"}, "spec": SPEC | {"model": "n"}})
    one, answers = controller(site), [True, False]

    class Short(LeaseOf):
        valid = False

        def held(self) -> bool:
            self.valid = False
            return answers.pop(0)

    one.lease = Short()  # type: ignore[assignment]
    one.round()
    assert answers == [] and not site.stored[MODEL_ROLLOUT.name, "other"].get("status")


def test_two_objects_of_one_model_do_not_fight(site: Site) -> None:
    """Both moved the same aliases."""
    story(site, bad=False)
    second = site.create(MODEL_ROLLOUT, {"metadata": {"name": "other"}, "spec": SPEC})
    second["metadata"]["creationTimestamp"] = "2026-02-02T00:00:00Z"
    settle(site, rounds=4)
    status = Status.model_validate(site.stored[MODEL_ROLLOUT.name, "other"]["status"])
    assert status.phase == "Blocked" and "mine already" in status.message and site.shares == {"2": 100}


def test_a_spec_that_is_none_is_told_and_what_serves_goes_on(site: Site) -> None:
    """One wrong number in one object ended the loop for all models."""
    story(site, bad=False)
    site.stored[MODEL_ROLLOUT.name, "mine"]["spec"] = SPEC | {"policy": {"steps": [50, 20]}}
    settle(site, rounds=2)
    assert site.status.phase == "Blocked" and "spec.policy.steps" in site.status.message
    assert site.shares == {"2": 100} and site.runs == {"2"}


def test_each_decision_is_an_event(site: Site) -> None:
    """`kubectl describe` told nothing of what had happened in the night."""
    story(site, bad=True)
    events = [one for (kind, _), one in site.stored.items() if kind == EVENT.name]
    assert [(one["reason"], one["type"]) for one in events] == [("Promoted", "Normal"), ("RolledBack", "Warning")]
    assert objects.MODEL_ROLLOUT.name == events[0]["involvedObject"]["kind"]


def test_a_version_gets_no_share_before_its_service_leads_to_it(site: Site) -> None:
    """After an outage of the API server nodes learned of ready pods half a minute late, and a share of all requests met
    nobody."""
    site.aliases = Aliases(challenger="1")
    settle(site, lambda: site.aliases == Aliases(champion="1"))
    site.unreached = {"mine-v2"}
    site.aliases = Aliases(challenger="2", champion="1")
    settle(site, rounds=20)
    assert site.shares == {"1": 100} and site.status.phase == "Preparing"
    assert "NotReached: the Service mine-v2" in site.status.message
    site.unreached = set()
    settle(site)
    assert site.aliases == Aliases(champion="2", previous="1")
