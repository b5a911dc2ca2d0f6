"""One level-triggered loop: look at registry and cluster, decide, act; every few seconds, whatever was done before.

Acting has an order in which it may break off anywhere. First who gets which requests, then the status with the
decision, then the registry, then pods: so a version that fails is out of the way before anything else, nothing is said
in the registry that is not on record, and what is missing is made in the next round.
"""

from __future__ import annotations

import math
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from threading import Event

from pydantic import SecretStr, ValidationError

from nvila.components.contracts.environment import revealed
from nvila.components.contracts.errors import NvilaError
from nvila.components.contracts.modelrollout import MANAGER, VERSION_LABEL, Spec, Status, Tried, dump
from nvila.components.kube.cluster import Cluster, Kind, Object
from nvila.components.kube.errors import ApiError, Conflict
from nvila.components.rollout.policy import Asked
from nvila.infra.controller import objects, tell
from nvila.infra.controller.ask import Asking
from nvila.infra.controller.decide import Round, decide
from nvila.infra.controller.lease import Lease
from nvila.infra.controller.mlflow_server import Unknown
from nvila.infra.controller.objects import DEPLOYMENT, MODEL_ROLLOUT, ROUTE, SERVICE, Owner, Platform
from nvila.infra.controller.outbox import Operation, operations
from nvila.infra.controller.reach import reaches
from nvila.infra.controller.registry import Registry
from nvila.infra.controller.scrape import scrape
from nvila.infra.controller.seen import Aliases, Registered, Running, Sight
from nvila.infra.controller.watch import Looked, Watch

ROUND_SECONDS = 2.0
"""From the beginning of one round to that of the next."""


@dataclass
class Controller:
    """Of the namespaces that it is told."""

    clusters: Sequence[Cluster]
    registry: Registry
    lease: Lease
    platform: Platform
    key: SecretStr | None = None
    """What the endpoints ask for."""
    webhook: tell.Webhook = field(default_factory=lambda: tell.Webhook("", ""))
    metrics: tell.Metrics = field(default_factory=tell.Metrics)
    asking: Asking = field(default_factory=Asking)

    def __post_init__(self) -> None:
        self._watches = [Watch(cluster) for cluster in self.clusters]
        self._shown: set[tuple[str, str, str]] = set()
        self._said: dict[str, str] = {}
        self._renewed = -math.inf

    def run(self, stop: Event) -> None:
        """Until told to stop."""
        while not stop.is_set():
            began = time.monotonic()
            try:
                if self._leads():
                    self.round()
            except NvilaError as error:
                self.failed("lease", error)
            self.metrics.leader.set(self.lease.valid)
            self.metrics.last = time.monotonic()
            stop.wait(max(0.1, ROUND_SECONDS - (time.monotonic() - began)))
        self.lease.release()

    def round(self) -> None:
        """Look at every ModelRollout once, and do what is to be done."""
        with self.metrics.seconds.time():
            aliases = self._aliases()
            self.metrics.reachable.set(aliases is not None)
            shown = set()
            for watch, cluster in zip(self._watches, self.clusters, strict=True):
                try:
                    looked = watch.look()
                except ApiError as error:
                    self.failed(f"namespace {cluster.namespace}", error)
                    shown |= {one for one in self._shown if one[0] == cluster.namespace}
                    continue
                for made in looked.rollouts:
                    model = str(made["spec"].get("model", ""))
                    shown.add((cluster.namespace, made["metadata"]["name"], model))
                    if not self._leads():
                        return
                    try:
                        _Turn(self, cluster, looked, made, aliases).go()
                    except Exception as error:  # whatever it is, other models are not to wait for it
                        self.failed(made["metadata"]["name"], error)
            for gone in self._shown - shown:
                self.metrics.forget(*gone)
            self._shown = shown
        self.metrics.rounds.inc()

    def _leads(self) -> bool:
        """Whether this process may act, asked again in the middle of a round that takes long.

        Raises:
            ApiError: one of its kinds.
        """
        if time.monotonic() - self._renewed > ROUND_SECONDS / 2 or not self.lease.valid:
            self._renewed = time.monotonic()
            return self.lease.held()
        return True

    def _aliases(self) -> Mapping[str, Aliases] | None:
        try:
            found = self.registry.aliases()
        except NvilaError as error:  # away, or no login there: a version that fails is rolled back all the same
            self.failed("registry", error)
            return None
        self._said.pop("registry", None)
        return found

    def failed(self, what: str, error: Exception) -> None:
        """Say it once, until it is another one."""
        self.metrics.errors.labels(what=type(error).__name__).inc()
        if self._said.get(what) != str(error):
            self._said[what] = str(error)
            ours = isinstance(error, NvilaError)
            trace = {} if ours else {"trace": "".join(traceback.format_exception(error))}
            tell.say(str(error), level="error", about=what, **trace)


class _Turn:
    """One ModelRollout in one round."""

    def __init__(
        self,
        controller: Controller,
        cluster: Cluster,
        looked: Looked,
        made: Object,
        aliases: Mapping[str, Aliases] | None,
    ) -> None:
        self.of, self.cluster, self.looked, self.made = controller, cluster, looked, made
        meta = made["metadata"]
        self.owner = Owner(meta["name"], cluster.namespace, meta["uid"])
        self.aliases = aliases
        self.version = str(meta["resourceVersion"])

    def go(self) -> None:
        """All of it.

        Raises:
            ApiError: of the cluster; what was not done is done in the next round.
        """
        if self.made["metadata"].get("deletionTimestamp"):
            return
        before = Status.model_validate(self.made.get("status") or {})
        try:
            spec = Spec.model_validate(self.made["spec"])
        except ValidationError as error:
            return self._cannot(before, _first(error))
        sight, versions = self._see(spec, before)
        made = decide(spec, before, sight)
        status = self._told(spec, before, made.status)
        self._requests(spec, status)
        self._store(before, status)
        self._announce(before, status)
        status = self._write(spec, status)
        self._pods(spec, status, versions)
        self._ask(spec, made, versions)
        self.of.metrics.show(self.owner.namespace, self.owner.name, status)

    def _cannot(self, before: Status, why: str) -> None:
        """The spec is none; what serves goes on."""
        self._store(before, before.model_copy(update={"phase": "Blocked", "message": why}))

    # Seeing

    def _see(self, spec: Spec, before: Status) -> tuple[Sight, dict[str, Registered]]:
        now, tried = time.time(), before.challenger
        aliases = None if self.aliases is None else self.aliases.get(spec.model, Aliases())
        known: dict[str, Registered] = {}
        if aliases:
            serves = before.champion.version if before.champion else ""
            wanted = {aliases.challenger, *({aliases.champion} - {serves})}
            if spec.override and spec.override != before.overridden:
                wanted.add(spec.override.version)
            try:
                for number in filter(None, wanted):
                    if found := self.of.registry.version(spec.model, number):
                        known[number] = found
            except NvilaError as error:
                self.of.failed(f"registry, {self.owner.name}", error)
                aliases = None
        there = [one.version for one in (before.champion, tried, *before.leaving) if one]
        running = {number: self.looked.running(self.owner.name, number) for number in there}
        if tried:  # nobody else is judged
            judged = [one.version for one in (before.champion, tried) if one]
            counted = scrape({(self.owner.name, number): running[number] for number in judged})
            running |= {number: found for (_, number), found in counted.items()}
            running[tried.version] = self._reached(tried, running[tried.version])
        asked: dict[str, Asked] = {}
        if tried:
            answers = {one: self.of.asking.answer(self._question(tried.since, one)) for one in there}
            asked = {one: found for one, found in answers.items() if found is not None}
        routed, missing = self.looked.routed(self.owner.name), self._missing(spec)
        return Sight(now, aliases, known, running, asked, routed, missing), known

    def _reached(self, tried: Tried, running: Running) -> Running:
        """The same, and before its first request whether users would get there."""
        if tried.step or not running.ready:
            return running
        name = objects.name_of(self.owner, tried.version)
        if reaches(self.looked.get(SERVICE, name)):
            return running
        return replace(running, unreached=f"NotReached: the Service {name} does not lead to them yet")

    def _missing(self, spec: Spec) -> str:
        same = [one for one in self.looked.rollouts if one["spec"].get("model") == spec.model]
        first = min(same, key=lambda one: (one["metadata"]["creationTimestamp"], one["metadata"]["name"]))
        if (name := first["metadata"]["name"]) != self.owner.name:
            return f"the model is served by the ModelRollout {name} already; delete one of the two"
        return self.looked.refused(self.owner.name)

    # Acting

    def _requests(self, spec: Spec, status: Status) -> None:
        """Who gets which requests."""
        champion = status.champion.version if status.champion else ""
        tried = status.challenger.version if status.challenger else ""
        self._apply(SERVICE, objects.champion_service(self.owner, champion))
        self._apply(ROUTE, objects.route(self.owner, spec, champion, tried, status.weight))

    def _store(self, before: Status, status: Status) -> None:
        """Keep the status, unless somebody has written the object since it was read.

        Raises:
            Conflict: somebody has.
        """
        generation = int(self.made["metadata"].get("generation", 0))
        status = status.model_copy(update={"observed_generation": generation})
        if status == before:
            return
        if not self.of.lease.valid:
            raise Conflict("another controller leads by now", where=self.owner.name)
        meta = {"name": self.owner.name, "resourceVersion": self.version}
        written = self.cluster.replace(MODEL_ROLLOUT, {"metadata": meta, "status": dump(status)}, "status")
        self.version = str(written["metadata"]["resourceVersion"])
        self.made = {**self.made, "status": dump(status)}

    def _write(self, spec: Spec, status: Status) -> Status:
        """Tell the registry what it is to know."""
        if not status.pending or self.aliases is None:
            return status
        now = self.aliases.get(spec.model, Aliases())
        try:
            for one in operations(status.pending, now):
                self._tell(spec.model, one)
        except NvilaError as error:  # whatever it is, requests and pods are not to wait for it
            self.of.failed(f"registry, {self.owner.name}", error)
            return status
        written = status.model_copy(update={"pending": []})
        self._store(status, written)
        return written

    def _tell(self, model: str, one: Operation) -> None:
        registry = self.of.registry
        try:
            if one.alias is None:
                registry.tag(model, one.version, one.tag, one.text)
            elif one.version:
                registry.point(model, one.alias, one.version)
            else:
                registry.drop(model, one.alias)
        except Unknown as error:  # somebody deleted the version, and what it should have been told with it
            tell.say(str(error), rollout=self.owner.name)

    def _pods(self, spec: Spec, status: Status, known: Mapping[str, Registered]) -> None:
        """A Deployment and a Service per version that serves or is tried; those of others go."""
        for one in (status.champion, status.challenger):
            if one:
                registered = known.get(one.version) or Registered(spec.model, one.version, one.digest)
                self._apply(SERVICE, objects.service(self.owner, one.version))
                self._apply(DEPLOYMENT, objects.deployment(self.owner, spec, registered, self.of.platform))
        staying = {one.version for one in (status.champion, status.challenger, *status.leaving) if one}
        for kind, found in self.looked.of(self.owner.name):
            meta = found["metadata"]
            version = meta["labels"].get(VERSION_LABEL)
            if version and version not in staying and "deletionTimestamp" not in meta:
                self.cluster.delete(kind, meta["name"], meta["uid"], meta["resourceVersion"])

    def _apply(self, kind: Kind, wanted: Object) -> None:
        """Where it is not so already."""
        if not objects.holds(self.looked.get(kind, wanted["metadata"]["name"]), wanted):
            self.cluster.apply(kind, wanted, MANAGER, force=True)

    # Asking and telling

    def _question(self, since: str, version: str) -> str:
        return f"{self.owner.uid} {since} {version}"

    def _ask(self, spec: Spec, made: Round, known: Mapping[str, Registered]) -> None:
        """Have pods answer pinned prompts: each version those of the version that is tried."""
        tried = made.status.challenger
        if tried is None or (registered := known.get(tried.version)) is None:
            return
        asking, registry, key = self.of.asking, self.of.registry, revealed(self.of.key)
        for number in (*made.ask_all, *made.ask_one):
            pods = [pod.address for pod in self.looked.running(self.owner.name, number).pods if pod.ready]
            question = self._question(tried.since, number)
            if number in made.ask_all:
                asking.begin(question, registered, number, pods, spec.policy.pinned_prompts, registry, key)
            else:
                asking.one(question, registered, number, pods, registry, key)

    def _told(self, spec: Spec, before: Status, status: Status) -> Status:
        """Which decisions the webhook has; it is told of those that are on record."""
        where = (self.owner.namespace, self.owner.name, spec.model)
        decisions = [
            one.model_copy(update={"told": True})
            if one in before.decisions and not one.told and self.of.webhook.told(*where, one)
            else one
            for one in status.decisions
        ]
        return status.model_copy(update={"decisions": decisions}) if decisions != status.decisions else status

    def _announce(self, before: Status, status: Status) -> None:
        """Log what is new, and make an Event of each decision."""
        about = {"rollout": self.owner.name, "namespace": self.owner.namespace, "model": status.model}
        known = {(one.at, one.version, one.verdict) for one in before.decisions}
        for one in reversed(status.decisions):
            if (one.at, one.version, one.verdict) not in known:
                tell.say(f"version {one.version} {one.verdict}: {'; '.join(one.reasons)}", **about)
                self.of.metrics.decisions.labels(self.owner.namespace, self.owner.name, status.model, one.verdict).inc()
                tell.record(self.cluster, self.made, one)
        if (status.phase, status.step, status.weight) != (before.phase, before.step, before.weight):
            tell.say(status.message, phase=status.phase, step=status.step, weight=status.weight, **about)


def _first(error: ValidationError) -> str:
    first = error.errors(include_url=False)[0]
    return f"spec.{'.'.join(map(str, first['loc']))}: {first['msg']}"
