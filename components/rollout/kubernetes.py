"""The target `kubernetes`: asks for a version by the alias `challenger`, and waits until the cluster's controller has
decided on it (`infra/controller`), which it does by the ModelRollout of the model.

Nothing is kept here: a decision is one of this run's where it was made after the run had registered the version, so a
step that is started again, in another pod or on another machine, goes on waiting for the same one.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from nvila.components.contracts.environment import Environment
from nvila.components.contracts.errors import (
    Cancelled,
    NvilaError,
    Preempted,
    Rejected,
    RolloutError,
    Unreachable,
)
from nvila.components.contracts.modelrollout import Decided, ServingEndpoint, ServingPolicy, Spec, Status, Verdict
from nvila.components.contracts.progress import Progress
from nvila.components.contracts.recipe.rollout import RolloutSettings
from nvila.components.contracts.text import say
from nvila.components.kube.cluster import Cluster
from nvila.components.kube.connect import connect
from nvila.components.kube.requests import Requests
from nvila.components.kube.rollouts import ADVICE, ModelRollout, Rollouts, serving_of
from nvila.components.kube.stopping import is_moved, undisturbed
from nvila.components.tracking.registry import CHALLENGER, challenge, find, withdraw

LOOK_SECONDS = 3.0
"""From one look to the next."""
QUIET_SECONDS = 60.0
"""A controller looks every few seconds; one that has taken no notice for so long is away."""
PROMOTED: set[Verdict] = {"promoted", "overridden"}
REFUSED: set[Verdict] = {"rolled back", "refused"}


@dataclass(frozen=True)
class Asked:
    """The version that is asked for."""

    model: str
    version: str
    since: datetime
    """When the run registered it."""

    def decision(self, status: Status) -> Decided | None:
        """The last one on this version since then that ends the wait."""
        ours = (one for one in status.decisions if one.version == self.version)
        ends = (one for one in ours if one.verdict in PROMOTED | REFUSED)
        return next((one for one in ends if datetime.fromisoformat(one.at) >= self.since), None)


@dataclass(frozen=True)
class Promoted:
    """The outcome of a successful rollout."""

    hostnames: list[str]
    reasons: list[str]
    pinned: dict[str, int]
    """What the version did with the pinned prompts; empty where it was not asked."""


def roll_out(asked: Asked, settings: RolloutSettings, runs: Path, here: Environment) -> Promoted:
    """Have the version served, if the policy of its ModelRollout lets it.

    Args:
        asked: the version.
        settings: what the ModelRollout begins with where the model has none yet.
        runs: the runs folder, which holds the local registry.
        here: says which cluster, and what models are served with there.

    Raises:
        Rejected: the policy said no; what served before still does.
        Cancelled: somebody asked for another version, or for none, or deleted the ModelRollout.
        RolloutError: no controller takes notice of it.
        ConfigError: the cluster does not say what models are served with, or has two ModelRollouts of this one.
        ApiError: the cluster lets nobody in, or serves no ModelRollout.
        Unreachable: MLflow does not answer at the beginning.
    """
    cluster = Cluster(Requests(connect(here.kubeconfig), advice=ADVICE))
    rollouts = Rollouts(cluster)
    found = rollouts.of_model(asked.model)
    if found is None:
        found = rollouts.make(asked.model, beginning(asked.model, settings, cluster, here))
        say(f"modelrollout/{found.name}: made in namespace {rollouts.namespace}")
    if answer := _answer(found, asked):
        return answer
    with _withdrawn_with_us(asked, runs, cluster, here):
        challenge(runs, asked.model, asked.version)
        return _wait(rollouts, found.name, asked, runs)


def beginning(model: str, settings: RolloutSettings, cluster: Cluster, here: Environment) -> Spec:
    """What people find in a ModelRollout that a run makes.

    Raises:
        ConfigError: the cluster does not say what models are served with.
    """
    return Spec(
        model=model,
        **dict(serving_of(cluster, here)),
        policy=ServingPolicy(**dict(settings.policy)),
        endpoint=ServingEndpoint(**dict(settings.endpoint)),
    )


def _wait(rollouts: Rollouts, name: str, asked: Asked, runs: Path) -> Promoted:
    progress, quiet = Progress(f"rollout of {asked.model} version {asked.version}"), _Quiet()
    while True:
        # In this order: a decision is stored before the registry is told.
        wanted = _wanted(asked, runs)
        now = rollouts.get(name)
        if now is None:
            raise Cancelled("the ModelRollout was deleted", where=f"modelrollout/{name}", do="A new run makes another.")
        if answer := _answer(now, asked):
            return answer
        if wanted is not None and wanted != asked.version:
            raise Cancelled(
                f"the alias {CHALLENGER} was {f'moved to version {wanted}' if wanted else 'removed'}",
                where=f"models:/{asked.model}/{asked.version}",
                do="Whoever did so wants another version, or none; run again to ask for this one.",
            )
        away = "MLflow does not answer; " if wanted is None else ""
        progress.update(0, away + _story(now.status))
        quiet.look(now, asked)
        time.sleep(LOOK_SECONDS)


class _Quiet:
    """How long nobody has taken notice of what was asked for."""

    def __init__(self) -> None:
        self._since, self._said = time.monotonic(), False

    def look(self, now: ModelRollout, asked: Asked) -> None:
        """Say it, and end it.

        Raises:
            RolloutError: it took longer than the policy's deadline.
        """
        if _noticed(now, asked):
            self._since, self._said = time.monotonic(), False
            return
        seconds = time.monotonic() - self._since
        if seconds < QUIET_SECONDS:
            return
        what = f"no controller has taken notice for {seconds:.0f} s"
        if seconds >= now.spec.policy.deadline_seconds:
            raise RolloutError(
                what,
                where=f"modelrollout/{now.name}",
                do="See whether it runs and reaches MLflow: `kubectl get pods -A -l app.kubernetes.io/component="
                "controller`, `kubectl get lease -A`, and its log; then run again.",
            )
        if not self._said:
            say(f"modelrollout/{now.name}: {what}; see `kubectl get pods -A -l app.kubernetes.io/component=controller`")
            self._said = True


def _noticed(now: ModelRollout, asked: Asked) -> bool:
    """Whether the controller works on it, or has a reason not to that is not its own."""
    status = now.status
    if status.observed_generation < now.generation:
        return False
    tried = status.challenger is not None and status.challenger.version == asked.version
    away = _condition(status, "RegistryReachable") == "False"
    return tried or away or now.spec.paused or status.phase not in ("Empty", "Serving")


def _answer(now: ModelRollout, asked: Asked) -> Promoted | None:
    """What has become of the version; None where that is open.

    Raises:
        Rejected: the policy said no.
    """
    if now.status.model not in ("", asked.model):  # people have changed spec.model, which blocks it
        return None
    decided, serves = asked.decision(now.status), now.status.champion
    if decided and decided.verdict in REFUSED:
        raise Rejected(
            f"rollout refuses the new version: {'; '.join(decided.reasons) or decided.verdict}",
            where=f"modelrollout/{now.name}, {decided.verdict} at {decided.weight} per cent",
            do=f"Version {serves.version} still serves." if serves else "Nothing is served.",
        )
    if decided:
        pinned = decided.pinned.model_dump() if decided.pinned else {}
        return Promoted(now.spec.hostnames, decided.reasons, pinned)
    if serves and serves.version == asked.version and _condition(now.status, "Ready") == "True":
        return Promoted(now.spec.hostnames, ["it is served already"], {})
    return None


def _condition(status: Status, kind: str) -> str:
    return next((one.status for one in status.conditions if one.type == kind), "Unknown")


def _story(status: Status) -> str:
    step = f", step {status.step} of {status.steps}, {status.weight} per cent" if status.phase == "Shifting" else ""
    return f"{status.phase}{step}: {status.message}".rstrip(": ")


def _wanted(asked: Asked, runs: Path) -> str | None:
    """The version that `challenger` names, empty where it is gone; None where MLflow does not say."""
    try:
        found = find(runs, asked.model, CHALLENGER)
    except Unreachable:
        return None
    return found.version if found else ""


@contextmanager
def _withdrawn_with_us(asked: Asked, runs: Path, cluster: Cluster, here: Environment) -> Iterator[None]:
    """Where this step ends without a decision, the version is asked for no more: nobody would look at what becomes of
    it. Not where its pod is only being moved: a successor goes on waiting."""
    try:
        yield
    except (Rejected, Cancelled):
        raise
    except BaseException as ending:
        with undisturbed():
            if isinstance(ending, Preempted | KeyboardInterrupt) and is_moved(cluster, here):
                say(f"version {asked.version} of {asked.model}: its rollout goes on; this pod is being moved")
                raise
            _withdraw(asked, runs)
        raise


def _withdraw(asked: Asked, runs: Path) -> None:
    what = f"version {asked.version} of {asked.model}"
    try:
        if withdraw(runs, asked.model, asked.version):
            say(f"{what}: withdrawn; the controller takes its requests away")
    except NvilaError as error:
        say(f"{what}: NOT withdrawn: {error}. Remove the alias {CHALLENGER} by hand, or run again to go on with it.")
