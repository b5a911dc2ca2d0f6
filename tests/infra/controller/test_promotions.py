"""The state machine of a promotion: each rule by a story, and any order of events by a small world of its own."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nvila.components.contracts.modelrollout import Override, Spec, Status
from nvila.components.rollout.policy import Asked, Counters
from nvila.infra.controller.decide import RULES, Round, decide
from nvila.infra.controller.outbox import operations
from nvila.infra.controller.seen import Aliases, Pod, Registered, Running, Sight

GOOD = Asked(asked=4, agreed=4, right=4)
POLICY = {"pinnedPrompts": 4, "steps": [25, 100], "minRequests": 4, "minSeconds": 2, "drainSeconds": 4}
POLICY |= {"deadlineSeconds": 30, "stepDeadlineSeconds": 60}


def spec_of(**fields: Any) -> Spec:
    return Spec.model_validate({"model": "m", "image": "i", "gateway": {"name": "g"}, "policy": POLICY} | fields)


@dataclass
class World:
    """A registry and pods that do as they are told; a round every second."""

    spec: Spec = field(default_factory=spec_of)
    status: Status = field(default_factory=Status)
    aliases: Aliases = field(default_factory=Aliases)
    now: float = 1_790_000_000.0
    away: bool = False
    approved: dict[str, str] = field(default_factory=dict)
    without_digest: set[str] = field(default_factory=set)
    ready: set[str] = field(default_factory=lambda: {str(n) for n in range(1, 9)})
    answers: dict[str, Asked] = field(default_factory=dict)
    errors: set[str] = field(default_factory=set)
    """Versions that fail every request of users."""
    restarts: dict[str, int] = field(default_factory=dict)
    fatal: dict[str, str] = field(default_factory=dict)
    counted: dict[str, Counters] = field(default_factory=dict)
    asked: dict[tuple[str, str], Asked] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    routed: bool = True
    users: int = 40
    """Requests in a second."""
    rules: list[str] = field(default_factory=list)

    @property
    def runs(self) -> list[str]:
        """Versions that have pods, by the status."""
        status = self.status
        found = [status.champion, status.challenger, *status.leaving]
        return [one.version for one in found if one]

    def sight(self) -> Sight:
        versions = {
            str(n): Registered(
                "m",
                str(n),
                "" if str(n) in self.without_digest else f"digest-{n}",
                approved_by=self.approved.get(str(n), ""),
            )
            for n in range(1, 9)
        }
        running = {}
        for v in self.runs:
            counted = self.counted.get(v, Counters())
            pod = Pod(
                f"pod-{v}",
                "10.0.0.1",
                v in self.ready and v not in self.fatal,
                self.restarts.get(v, 0),
                counted=counted,
            )
            running[v] = Running((replace(pod, why=self.fatal.get(v, ""), fatal=v in self.fatal),))
        tried = self.status.challenger
        begun = tried.since if tried else ""
        asked = {v: found for (since, v), found in self.asked.items() if since == begun}
        return Sight(
            self.now, None if self.away else self.aliases, {} if self.away else versions, running, asked, self.routed
        )

    def round(self, *, torn: bool = False, seconds: float = 1.0) -> Round:
        """One round; `torn`: the controller is killed before it has written the registry."""
        made = decide(self.spec, self.status, self.sight())
        self.status = Status.model_validate_json(made.status.model_dump_json(by_alias=True))
        self.rules += [made.rule] if made.rule else []
        tried = self.status.challenger
        for version in made.ask_all:
            assert tried
            self.asked[tried.since, version] = self.answers.get(version, GOOD)
        self.serve(int(self.users * seconds))
        if not torn and not self.away:
            self.write()
        self.now += seconds
        return made

    def write(self) -> None:
        for one in operations(self.status.pending, self.aliases):
            if one.alias:
                self.aliases = replace(self.aliases, **{one.alias: one.version})
            else:
                self.tags[one.version] = one.text
        self.status = self.status.model_copy(update={"pending": []})

    def serve(self, requests: int) -> None:
        """Users ask; a version that has errors fails them all."""
        status = self.status
        shares = [(status.challenger, status.weight), (status.champion, 100 - status.weight)]
        for one, share in shares:
            if one and share and one.version in self.ready:
                n = requests * share // 100
                mine = Counters(requests=n, errors=n if one.version in self.errors else 0)
                self.counted[one.version] = self.counted.get(one.version, Counters()) + mine

    def until(self, there: Any, rounds: int = 200) -> None:
        for _ in range(rounds):
            if there(self):
                return
            self.round()
        raise AssertionError(self.status.model_dump_json(indent=1))

    def settle(self) -> None:
        """Until nothing happens any more."""
        quiet = 0
        for _ in range(400):
            before = (len(self.rules), self.status.phase, self.status.leaving)
            self.round()
            moved = before != (len(self.rules), self.status.phase, self.status.leaving) or self.status.challenger
            quiet = 0 if moved else quiet + 1
            if quiet > 3:
                return
        raise AssertionError(self.status.model_dump_json(indent=1))

    @property
    def serves(self) -> str:
        return self.status.champion.version if self.status.champion else ""

    @property
    def verdicts(self) -> list[tuple[str, str]]:
        return [(one.verdict, one.version) for one in reversed(self.status.decisions)]


def serving(version: str = "1", **fields: Any) -> World:
    """A world in which a version serves."""
    world = World(**fields)
    world.aliases = Aliases(challenger=version)
    world.settle()
    assert world.serves == version and world.aliases == Aliases(champion=version)
    return world


def wish(world: World, version: str) -> None:
    world.aliases = replace(world.aliases, challenger=version)


def test_a_good_version_goes_through_every_step() -> None:
    """A step was skipped, or the old version's pods stayed, or a reader of `previous` found nothing to go back to."""
    world = serving()
    wish(world, "2")
    seen: list[tuple[str, int]] = []
    for _ in range(40):
        world.round()
        seen.append((world.status.phase, world.status.weight))
    assert list(dict.fromkeys(seen)) == [
        ("Preparing", 0),  # its pods are there from the next round on
        ("Asking", 0),
        ("Shifting", 25),
        ("Shifting", 100),
        ("Serving", 0),
    ]
    assert world.aliases == Aliases(champion="2", previous="1") and world.runs == ["2"]
    assert world.verdicts == [("promoted", "1"), ("promoted", "2")] and world.tags["2"].startswith("promoted: 4 of 4")
    last = world.status.decisions[0]
    assert last.instead_of == "1" and last.step == 2 and last.weight == 100 and last.counted and last.counted.requests


def test_pods_of_the_old_version_answer_what_they_have() -> None:
    """Its pods went in the moment of the promotion, with requests in hand."""
    world = serving()
    wish(world, "2")
    world.until(lambda w: w.serves == "2")
    assert world.runs == ["2", "1"]
    world.round(seconds=3)
    assert world.runs == ["2", "1"]
    world.round(seconds=3)
    world.round()
    assert world.runs == ["2"]


def test_pods_stay_until_the_gateway_has_taken_the_route() -> None:
    """The API server was away: the Gateway still sent requests to pods whose time was over, and they were lost."""
    world = serving()
    wish(world, "2")
    world.until(lambda w: w.serves == "2")
    world.routed = False
    for _round in range(30):
        world.round()
    assert world.runs == ["2", "1"]
    world.routed = True
    world.round()
    assert world.runs == ["2", "1"], "its time begins now"
    world.round(seconds=5)
    world.round()
    assert world.runs == ["2"]


BAD: dict[str, tuple[dict[str, Any], str, int]] = {
    "wrong answers": ({"answers": {"2": Asked(asked=4, agreed=0)}}, "0 of 4 answers equal", 0),
    "errors of users": ({"errors": {"2"}}, "requests failed at 25 per cent", 25),
    "never ready": ({"ready": {"1"}}, "0 of 1 pods are ready after 30 seconds", 0),
    "ends by itself": ({"restarts": {"2": 1}}, "ended by itself, once", 0),
    "other files": ({"fatal": {"2": "Digest: other files"}}, "Digest: other files", 0),
}


@pytest.mark.parametrize("harm", BAD)
def test_a_bad_version_is_rolled_back(harm: str) -> None:
    """It kept its share of the users, or its alias, and was tried again and again all night."""
    fields, reason, weight = BAD[harm]
    world = serving()
    for name, value in fields.items():
        setattr(world, name, value)
    wish(world, "2")
    world.until(lambda w: w.rules[-1] == "roll back")
    assert (world.status.weight, world.status.challenger, world.serves) == (0, None, "1")
    world.settle()
    assert world.aliases == Aliases(champion="1") and world.runs == ["1"]
    decided = world.status.decisions[0]
    assert decided.verdict == "rolled back" and reason in decided.reasons[0] and decided.weight == weight
    assert reason in world.tags["2"] and reason in world.status.message
    wish(world, "2")
    setattr(world, next(iter(fields)), getattr(World(), next(iter(fields))))
    world.settle()
    assert world.serves == "2", "who asks again gets another try"


def test_a_breach_takes_the_weight_in_the_same_round_also_while_the_registry_is_away() -> None:
    """The registry was away, and a version that failed everybody served on until it came back."""
    world = serving()
    wish(world, "2")
    world.until(lambda w: w.status.weight == 25)
    world.away, world.errors = True, {"2"}
    world.round()
    world.round()
    assert world.status.weight == 0 and world.aliases.challenger == "2" and world.status.pending
    for _ in range(9):
        world.round()
    assert world.serves == "1" and world.status.challenger is None, "it was begun again by an alias of before"
    world.away = False
    world.settle()
    assert world.aliases == Aliases(champion="1") and "failed" in world.tags["2"]


def test_traffic_stays_while_the_registry_is_away_and_no_deadline_passes() -> None:
    """An outage of MLflow promoted, or refused, a version that nobody could judge."""
    world = serving()
    wish(world, "2")
    world.until(lambda w: w.status.weight == 25)
    world.away = True
    for _ in range(200):
        world.round()
    assert world.status.weight == 25 and "registry does not answer" in world.status.message
    kinds = {one.type: one.status for one in world.status.conditions}
    assert kinds == {"Ready": "True", "RegistryReachable": "False", "Progressing": "True"}
    world.away = False
    world.settle()
    assert world.serves == "2"


def test_a_champion_moved_by_hand_is_a_request() -> None:
    """A version that nobody had looked at served everybody, as somebody moved an alias at night."""
    world = serving()
    world.aliases = replace(world.aliases, champion="3")
    world.round()
    assert world.aliases == Aliases(challenger="3", champion="1"), "put back within one round"
    world.until(lambda w: w.serves == "3")
    assert ("requested", "3") in world.verdicts and world.aliases.previous == "1"
    first = next(one for one in world.status.decisions if one.verdict == "requested")
    assert first.instead_of == "1" and "by hand" in first.reasons[0]


def test_a_champion_moved_by_hand_in_mid_rollout_is_tried_next() -> None:
    """The wish was lost to the version that was being tried, or reached users at its weight."""
    world = serving()
    wish(world, "2")
    world.until(lambda w: w.status.weight == 25)
    world.aliases = replace(world.aliases, champion="3")
    world.round()
    world.round()
    assert world.status.weight == 0 and world.status.challenger is None, "weight 0 first"
    world.settle()
    assert world.verdicts[-3:] == [("requested", "3"), ("withdrawn", "2"), ("promoted", "3")]


def test_a_champion_moved_while_a_promotion_is_written_is_not_lost() -> None:
    """The controller's own writing ran over what somebody had just asked for."""
    world = serving()
    wish(world, "2")
    world.until(lambda w: w.status.weight == 100)
    while world.serves != "2":
        world.round(torn=True)
    world.aliases = replace(world.aliases, champion="3")
    world.settle()
    assert world.serves == "3" and world.aliases == Aliases(champion="3", previous="2")


def test_a_champion_removed_by_hand_is_put_back() -> None:
    """Readers of the alias found nothing although a version served."""
    world = serving()
    world.aliases = Aliases()
    world.settle()
    assert world.aliases == Aliases(champion="1") and world.verdicts[-1] == ("put back", "1")


def test_what_the_registry_called_champion_before_is_tried_first() -> None:
    """A ModelRollout that was made anew served nothing, or served unseen what an alias named."""
    world = World(aliases=Aliases(champion="4"))
    world.settle()
    assert world.serves == "4" and world.verdicts == [("requested", "4"), ("promoted", "4")]
    refused = World(aliases=Aliases(champion="4"), answers={"4": Asked(asked=4)})
    refused.settle()
    assert refused.aliases == Aliases() and refused.serves == ""


@pytest.mark.parametrize("now", ["", "3"])
def test_a_challenger_that_is_moved_or_removed_gets_no_more_requests_first(now: str) -> None:
    """Two versions were tried at a time, or one that nobody wanted any more went on to be champion."""
    world = serving()
    wish(world, "2")
    world.until(lambda w: w.status.weight == 25)
    wish(world, now)
    world.round()
    assert world.status.weight == 0 and world.status.challenger is None
    world.settle()
    assert world.serves == (now or "1") and ("withdrawn", "2") in world.verdicts


def test_an_override_skips_the_steps_and_is_acted_on_once() -> None:
    """A rollback at 3 a.m. waited for twelve prompts; and it was rolled out again after the next promotion."""
    world = serving()
    wish(world, "2")
    world.until(lambda w: w.status.weight == 25)
    world.spec = spec_of(override={"version": "4", "reason": "2 is slow for one customer"}, paused=True)
    world.settle()
    assert world.serves == "4" and world.verdicts[-2:] == [("withdrawn", "2"), ("overridden", "4")]
    assert world.aliases == Aliases(champion="4", previous="1") and world.status.decisions[0].step == 0
    world.spec = spec_of(override={"version": "4", "reason": "2 is slow for one customer"})
    wish(world, "5")
    world.settle()
    assert world.serves == "5"
    world.spec = spec_of(override={"version": "4", "reason": "again"})
    world.settle()
    assert world.serves == "4" and world.status.overridden == Override(version="4", reason="again")


def test_going_back_to_the_previous_version_needs_no_registry() -> None:
    """MLflow was away in the night of the bad promotion, and nobody could go back."""
    world = serving()
    wish(world, "2")
    world.settle()
    world.away = True
    world.spec = spec_of(override={"version": "1", "reason": "back"})
    for _ in range(9):
        world.round()
    assert world.serves == "1" and world.aliases.champion == "2"
    world.away = False
    world.settle()
    assert world.aliases == Aliases(champion="1", previous="2")


def test_an_override_that_does_not_get_ready_or_does_not_exist_leaves_what_serves() -> None:
    """A slip of a number took the endpoint down."""
    world = serving()
    world.ready.discard("6")
    world.spec = spec_of(override={"version": "6", "reason": "x"})
    world.settle()
    assert world.serves == "1" and world.verdicts[-1] == ("refused", "6")
    world.spec = spec_of(override={"version": "99", "reason": "x"})
    world.settle()
    assert world.serves == "1" and world.verdicts[-1] == ("refused", "99")
    world.ready.add("6")
    world.spec = spec_of(override={"version": "6", "reason": "y"})
    world.until(lambda w: w.status.challenger is not None)
    world.spec = spec_of()
    world.ready.discard("6")
    world.settle()
    assert world.serves == "1"


def test_paused_holds_everything_but_a_failure() -> None:
    """A pause let a version go on to the next step, or kept one that failed before its users."""
    world = serving()
    world.spec = spec_of(paused=True)
    wish(world, "2")
    for _ in range(20):
        world.round()
    assert world.runs == ["1"] and "paused" in world.status.message
    world.spec = spec_of()
    world.until(lambda w: w.status.weight == 25)
    world.spec = spec_of(paused=True)
    for _ in range(200):
        world.round()
    assert world.status.weight == 25
    world.errors = {"2"}
    world.settle()
    assert world.serves == "1" and world.verdicts[-1] == ("rolled back", "2")


def test_nobody_is_served_a_version_without_its_approval() -> None:
    """The four-eyes rule was a line in a wiki."""
    world = serving()
    world.spec = spec_of(approvers=["anna"])
    wish(world, "2")
    for _ in range(60):
        world.round()
    assert world.status.phase == "Asking" and "nvila.approved-by" in world.status.message
    world.approved = {"2": "somebody else"}
    world.round()
    assert world.status.weight == 0
    world.approved = {"2": "anna"}
    world.settle()
    assert world.serves == "2"


def test_what_cannot_be_tried_is_refused_with_the_reason() -> None:
    """A version that somebody uploaded by hand would be served with no digest to hold its files against."""
    world = serving(without_digest={"7"})
    wish(world, "7")
    world.settle()
    assert world.aliases == Aliases(champion="1") and world.verdicts[-1] == ("refused", "7")
    wish(world, "1")
    world.settle()
    assert world.aliases == Aliases(champion="1") and world.verdicts[-1] == ("promoted", "1")


def test_another_model_in_the_same_object_is_told_and_changes_nothing() -> None:
    """Versions of two models have the same numbers: version 2 of the other one would have been served."""
    world = serving()
    world.spec = spec_of(model="other")
    wish(world, "2")
    for _ in range(9):
        world.round()
    assert world.status.phase == "Blocked" and "cannot change" in world.status.message and world.serves == "1"


EVENTS = st.one_of(
    st.tuples(st.just("challenger"), st.sampled_from(["", "2", "3", "4"])),
    st.tuples(st.just("champion"), st.sampled_from(["", "2", "3", "4"])),
    st.tuples(st.just("away"), st.booleans()),
    st.tuples(st.just("errors"), st.sampled_from(["2", "3"])),
    st.tuples(st.just("unready"), st.sampled_from(["2", "3", "4"])),
    st.tuples(st.just("paused"), st.booleans()),
    st.tuples(st.just("override"), st.sampled_from(["1", "3", "99"])),
    st.tuples(st.just("wait"), st.integers(1, 12)),
    st.tuples(st.just("torn"), st.just(0)),
)


@settings(max_examples=300, deadline=None)
@given(st.lists(EVENTS, max_size=24))
def test_any_order_of_events_ends_with_aliases_that_say_what_serves(events: list[tuple[str, Any]]) -> None:
    """Some order of a promotion, a kill and an outage left a version at a weight, or an alias that was not true."""
    world = serving()
    for number, (what, value) in enumerate(events):
        torn = what == "torn"
        if what in ("challenger", "champion"):
            world.aliases = replace(world.aliases, **{what: value})
        elif what == "away":
            world.away = value
        elif what == "errors":
            world.errors = world.errors ^ {value}
        elif what == "unready":
            world.ready = world.ready ^ {value}
        elif what == "paused":
            world.spec = world.spec.model_copy(update={"paused": value})
        elif what == "override":
            wanted = Override(version=value, reason=f"event {number}")
            world.spec = world.spec.model_copy(update={"override": wanted})
        for _ in range(value if what == "wait" else 1):
            before = world.serves
            phase = world.status.phase
            made = world.round(torn=torn)
            tried = made.status.challenger
            rule = next((one for one in RULES if one.name == made.rule), None)
            if rule and rule.after:
                assert phase in (rule.before or (phase,)), (
                    f"{rule.name} out of {phase}, which the drawing does not know"
                )
                there = {rule.after} | ({"Empty"} if not world.serves else set())
                there |= {"Asking"} if rule.name == "begin" else set()  # where its pods have not gone yet
                assert made.status.phase in there or rule.name == "override", "which gives way, or is done, first"
            assert (made.status.weight > 0) == bool(tried and tried.step), "a weight for nobody, or before step 1"
            if tried and tried.step:
                assert tried.pinned and tried.pinned.agreed == 4, "users met a version that had not answered"
            if world.serves != before:
                assert before in [one.version for one in world.status.leaving], "its pods went with requests in hand"
    world.away, world.spec = False, world.spec.model_copy(update={"paused": False})
    world.settle()
    assert world.serves and world.aliases.champion == world.serves and not world.aliases.challenger
    assert world.runs == [world.serves] and not world.status.pending and world.status.weight == 0
    assert set(world.rules) <= {rule.name for rule in RULES}
