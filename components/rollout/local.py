"""The target `local`: versions run side by side on this machine, behind one address that users know.

The supervisor keeps them running (`serve/supervisor.py`); here is decided, by the policy, which of them gets how many
requests, and written down as what is wanted. Whatever ends this process, the new version is then tried by nobody: the
supervisor drops it, and what served before serves on.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pydantic import SecretStr

from nvila.components.contracts import memory
from nvila.components.contracts.environment import revealed
from nvila.components.contracts.errors import PreflightError, Rejected, RolloutError
from nvila.components.contracts.processes import Process
from nvila.components.contracts.progress import Progress
from nvila.components.contracts.recipe.rollout import Policy, Strategy
from nvila.components.metrics.pinned import Pinned
from nvila.components.rollout import pinned
from nvila.components.rollout.policy import Asked, Counters, Observation, Window, against, decide, weight
from nvila.components.serve import counted, deployment, interpreter
from nvila.components.serve.deployment import Decision, Role, Status, Version, VersionStatus, Wanted

ROUND_SECONDS = 0.5
"""From one look to the next."""
NOBODY_TRIED: dict[str, Any] = {"challenger": None, "replaced": None, "weight": 0, "tried_by": None}
"""Fields of `Wanted` while no rollout is under way."""


@dataclass(frozen=True)
class Candidate:
    """What is to be served, and where."""

    version: Version
    host: str
    port: int
    key: SecretStr | None = None
    """What the endpoint asks for; None leaves it open to this machine."""

    def is_served(self, wanted: Wanted) -> bool:
        """Whether it is the champion, with this very key; moving it to another address takes no server."""
        return self.version == wanted.champion and deployment.matches(wanted.key, self.key)

    @property
    def address(self) -> dict[str, Any]:
        """Fields of `Wanted`."""
        return {"host": self.host, "port": self.port}


@dataclass(frozen=True)
class Served:
    """The outcome of a successful rollout."""

    url: str
    pinned: dict[str, int]
    """What the version did with the pinned prompts."""
    reasons: list[str]
    """Why it was decided so, step by step."""
    measured: dict[str, float] = field(default_factory=dict)


def reconcile(
    runs: Path, candidate: Candidate, prompts: Sequence[Pinned], policy: Policy, strategy: Strategy, max_tokens: int
) -> Served:
    """Make the endpoint serve the candidate, if the policy lets it.

    Args:
        runs: the runs folder.
        candidate: the version and its address.
        prompts: the pinned prompts.
        policy: the recipe's thresholds.
        strategy: whether the champion serves meanwhile.
        max_tokens: longest answer, as in the evaluation.

    Raises:
        DamagedError: the version's files are not what the step wrote, or are those of another model.
        PreflightError: the port is held by a program that is not ours, or memory does not hold both versions.
        Rejected: the policy said no; the old version serves on, or again.
        RolloutError: the endpoint did not come up, or somebody else changed it meanwhile.
    """
    with deployment.rolling(runs):
        deployment.require_address(runs, candidate.host, candidate.port)
        deployment.require_files(candidate.version)
        before = deployment.read(runs, Wanted)
        before = None if before is None or before.stopped else before
        if before and candidate.is_served(before):
            return _served_already(runs, candidate, prompts, policy, max_tokens)
        return _Rollout(runs, candidate, before, prompts, policy, strategy, max_tokens).run()


def _served_already(
    runs: Path, candidate: Candidate, prompts: Sequence[Pinned], policy: Policy, max_tokens: int
) -> Served:
    """The champion is the candidate: it has to answer as it was evaluated, like any other."""
    wanted = _begin(runs, candidate, **candidate.address)
    status = deployment.wait_for(runs, wanted.generation, _champion_is_ready, policy.deadline_seconds)
    champion = _server(status, "champion")
    asked = pinned.observe(champion.url, candidate.version.name, prompts, max_tokens, revealed(candidate.key))
    if reasons := list(against(asked, None, policy)):
        _decided(runs, candidate.version, "rolled back", reasons)
        raise Rejected(
            "the version that is served does not answer as it was evaluated: " + "; ".join(reasons),
            where=status.url,
            do="It is still served, as nothing else is: `nvila stop` ends it, and the next run starts it anew.",
        )
    return Served(status.url, vars(asked), ["it is served already, and answers as it was evaluated"])


class _Rollout:
    """One rollout, from the first look at what serves to the new champion or the old one."""

    def __init__(
        self,
        runs: Path,
        candidate: Candidate,
        before: Wanted | None,
        prompts: Sequence[Pinned],
        policy: Policy,
        strategy: Strategy,
        max_tokens: int,
    ) -> None:
        self.runs, self.candidate, self.prompts, self.max_tokens = runs, candidate, prompts, max_tokens
        self.old = before.champion or before.replaced if before else None
        self.replaces = self.old is not None and (
            strategy == "replace" or not deployment.matches(before.key if before else None, candidate.key)
        )
        # Who asks for a model by another name would get an answer of neither.
        beside = self.old is not None and not self.replaces and self.old.name == candidate.version.name
        self.policy = policy if beside else policy.model_copy(update={"steps": []})
        self.windows: dict[Role, Window] = {"challenger": Window(), "champion": Window()}
        self.asked: dict[Role, Asked] = {"challenger": Asked(), "champion": Asked()}
        self.pinned: dict[Role, Asked] = {}
        self.reasons: list[str] = []

    def run(self) -> Served:
        """Step by step.

        Raises:
            PreflightError: memory does not hold both versions.
            Rejected: the policy said no.
            RolloutError: the endpoint did not come up, or somebody else changed it meanwhile.
        """
        if self.old is not None and not self.replaces:
            _require_room(self.candidate.version)
        began = time.monotonic()
        with self._tried() as wanted:
            for step in range(len(self.policy.steps) + 1):
                if step:
                    wanted = self._change(wanted, weight=weight(step, self.policy))
                self._pass(step, wanted)
                if not step:
                    ready = time.monotonic() - began
            wanted = self._change(wanted, champion=self.candidate.version, **NOBODY_TRIED, **self.candidate.address)
        status = deployment.wait_for(self.runs, wanted.generation, _champion_is_ready, self.policy.deadline_seconds)
        _decided(self.runs, self.candidate.version, "promoted", self.reasons)
        return Served(status.url, vars(self.pinned["challenger"]), self.reasons, {"seconds_until_asked": ready})

    @contextmanager
    def _tried(self) -> Iterator[Wanted]:
        """The new version beside the champion; what goes wrong leaves the champion alone again."""
        beside = {"champion": self.old} if self.old and not self.replaces else self.candidate.address
        away = {"champion": None, "replaced": self.old} if self.replaces else {}
        wanted = _begin(
            self.runs,
            self.candidate,
            challenger=self.candidate.version,
            weight=0,
            tried_by=(tried_by := Process.this()),
            **beside,
            **away,
        )
        try:
            yield wanted
        except BaseException:
            with deployment.exclusive(self.runs):
                now = deployment.read(self.runs, Wanted)
                if now and now.tried_by == tried_by:
                    deployment.change(self.runs, champion=now.champion or now.replaced, **NOBODY_TRIED)
            raise

    def _pass(self, step: int, wanted: Wanted) -> None:
        """Wait until the policy lets the new version go on from a step."""
        entered = time.monotonic()
        at = f"rollout at {weight(step, self.policy)} per cent"
        progress = Progress(at)
        self.windows = {role: window.begin() for role, window in self.windows.items()}
        while True:
            status = self._status(wanted)
            seen = {role: self._look(role, status) for role in self.windows}
            champion = seen["champion"] if self.old is not None and not self.replaces else None
            seconds = time.monotonic() - entered
            verdict = decide(step, seconds, seen["challenger"], champion, self.policy)
            progress.update(0, "; ".join(verdict.reasons))
            if verdict.decision == "roll back":
                self.reasons += verdict.reasons
                _decided(self.runs, self.candidate.version, "rolled back", self.reasons)
                raise Rejected(
                    "rollout refuses the new version: " + "; ".join(verdict.reasons),
                    where=at,
                    do="What served before still does." if self.old else "Nothing is served.",
                )
            if verdict.decision != "hold":
                self.reasons.append("; ".join(verdict.reasons))
                return
            if not self._ask(step, status, seen["challenger"]):
                time.sleep(ROUND_SECONDS)

    def _ask(self, step: int, status: Status, challenger: Observation) -> bool:
        """Ask pinned prompts where the policy waits for answers; whether any was asked."""
        if not challenger.ready or (step and challenger.seen.requests >= self.policy.min_requests):
            return False
        there = [server for role in self.windows if (server := status.of(role)) and server.state == "ready"]
        for one in there:
            prompts = [self.prompts[self.asked[one.role].asked % len(self.prompts)]] if step else self.prompts
            found = pinned.observe(one.url, one.version.name, prompts, self.max_tokens, revealed(self.candidate.key))
            if step:
                self.asked[one.role] += found
            else:
                self.pinned[one.role] = found
        return bool(there)

    def _look(self, role: Role, status: Status) -> Observation:
        """What is known of the version now."""
        one = status.of(role)
        if one is None:
            return Observation(ready=False)
        asked = self.asked[role]
        said = {
            "pinned prompts": Counters(requests=asked.asked, errors=asked.errors),
            f"Envoy, {one.url}": counted.requests(status.admin, one.url),
            f"vLLM, {one.pid}": counted.times(one.url),
        }
        self.windows[role] = self.windows[role].read({of: counters for of, counters in said.items() if counters})
        return Observation(
            ready=one.state == "ready",
            ended=one.restarts,
            why=one.ended,
            pinned=self.pinned.get(role),
            seen=self.windows[role].total,
        )

    def _status(self, wanted: Wanted) -> Status:
        """What has become of what is wanted."""
        now = deployment.read(self.runs, Wanted)
        if now is None or now.generation != wanted.generation:
            raise RolloutError(
                "somebody else has changed what is served",
                where=str(deployment.place(self.runs, Wanted)),
                do="Run it again, once nobody else serves from this folder of runs.",
            )
        return deployment.wait_for(self.runs, wanted.generation, lambda status: True, self.policy.deadline_seconds)

    def _change(self, before: Wanted, **fields: object) -> Wanted:
        with deployment.exclusive(self.runs):
            self._status(before)
            return deployment.change(self.runs, **fields)


def _decided(runs: Path, version: Version, decision: Literal["promoted", "rolled back"], reasons: list[str]) -> None:
    """Keep it for `nvila status`."""
    deployment.write(runs, Decision(at=time.time(), version=version, decision=decision, reasons=reasons))


def _begin(runs: Path, candidate: Candidate, **fields: object) -> Wanted:
    """Write down what is wanted, and have a supervisor look after it."""
    with deployment.exclusive(runs):
        wanted = deployment.change(runs, key=deployment.fingerprint(candidate.key), fallback=None, **fields)
        deployment.ensure_supervisor(runs, candidate.key)
    return wanted


def _champion_is_ready(status: Status) -> bool:
    champion = status.of("champion")
    return champion is not None and champion.state == "ready"


def _server(status: Status, role: Role) -> VersionStatus:
    found = status.of(role)
    assert found is not None
    return found


def _require_room(version: Version) -> None:
    """Raises:
    PreflightError: a second server does not fit into memory beside the one that serves.
    """
    needed, available = interpreter.memory_bytes(Path(version.model_dir)), memory.available_bytes()
    if needed > available:
        raise PreflightError(
            f"the new version needs about {memory.gib(needed)} of memory beside the one that serves, and "
            f"{memory.gib(available)} are available",
            where="rollout.strategy",
            do="Free memory, or say `replace`: the old version is stopped first, and nothing is served meanwhile.",
        )
