"""The target `local`: one vLLM server on this machine that users reach at one address, whichever version it serves.

A new version is tried beside the old one (or right at the address when nothing of ours runs there), and only after
the policy's yes does it take the address. The step decides nothing itself; `policy` does.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from pydantic import SecretStr

from nvila.components.contracts.environment import revealed
from nvila.components.contracts.errors import DamagedError, Rejected, RolloutError
from nvila.components.contracts.manifest import written_by
from nvila.components.contracts.processes import birth
from nvila.components.contracts.recipe.rollout import Policy
from nvila.components.rollout.pinned import Pinned, observe
from nvila.components.rollout.policy import Observation, decide
from nvila.components.serve import endpoint as records
from nvila.components.serve import server
from nvila.components.serve.endpoint import Endpoint
from nvila.components.serve.ports import free_port

HEALTH_SECONDS = 30.0


@dataclass(frozen=True)
class Wanted:
    """What should be served, and where."""

    model: str
    version: str
    digest: str
    model_dir: Path
    host: str
    port: int
    key: SecretStr | None
    """What the endpoint asks for; None leaves it open to this machine."""

    def served_by(self, endpoint: Endpoint) -> bool:
        """Whether a record is of this very version at this very address."""
        mine = (self.model, self.version, self.digest, self.host, self.port)
        return mine == (endpoint.model, endpoint.version, endpoint.digest, endpoint.host, endpoint.port)


@dataclass(frozen=True)
class Served:
    """The outcome of a successful rollout."""

    endpoint: Endpoint
    measured: dict[str, float]


def reconcile(runs: Path, wanted: Wanted, prompts: list[Pinned], policy: Policy, max_tokens: int) -> Served:
    """Make the endpoint serve the wanted version, if the policy lets it. The caller holds `endpoint.exclusive`.

    Args:
        runs: the runs folder.
        wanted: the version and its address.
        prompts: the pinned prompts.
        policy: the recipe's thresholds.
        max_tokens: longest answer, as in the evaluation.

    Raises:
        PreflightError: the port is held, or was taken meanwhile, by a program that is not ours.
        Rejected: the policy said no; the old version serves on, or again.
        RolloutError: the promoted version did not come up at its address; the old one was started again.
    """
    orphan = records.read(runs, records.CHALLENGER)
    if orphan and orphan.alive:  # left by a run that was killed
        server.stop(orphan.pid)
    recorded = records.read(runs)
    old = recorded if recorded and recorded.alive else None
    if old and wanted.served_by(old):
        if _healthy(old):
            return Served(old, {})
        server.stop(old.pid)
        old = None
    in_place = old is None or (old.host, old.port) != (wanted.host, wanted.port)
    tried = _try(runs, wanted, wanted.port if in_place else free_port(wanted.host), prompts, policy, max_tokens, old)
    if isinstance(tried, Rejected):
        if old is None and recorded and recorded.digest != wanted.digest:
            _start_again(runs, recorded, policy, wanted.key)
        raise tried
    challenger, measured = tried
    if not in_place:
        server.stop(challenger.pid)
    if old:
        server.stop(old.pid)
    if not in_place:
        challenger = _take_over(runs, wanted, challenger, old, policy)
    records.keep(runs, challenger)
    return Served(challenger, measured)


def start(runs: Path, wanted: Wanted, port: int, deadline_seconds: float) -> tuple[Endpoint, float]:
    """Start a server and wait until it is ready: its record, for `endpoint.keep`, and the seconds it took.

    Its files are read first, every time. Whatever goes wrong or ends the wait, SIGKILL too, no server stays behind.

    Raises:
        DamagedError: the files are not what the step wrote, or are those of another model than is wanted.
        RolloutError: the server did not come up.
    """
    made = written_by(wanted.model_dir)
    if made is not None and made.digest != wanted.digest:
        raise DamagedError(
            f"the folder of {wanted.model} version {wanted.version} holds another model",
            where=str(wanted.model_dir),
            value={"wanted": wanted.digest[:12], "there": made.digest[:12]},
            do="Run the recipe again, or serve the folder by its path.",
        )
    log = runs / records.SERVING / f"{wanted.model}-v{wanted.version}.log"
    started = server.start(
        wanted.model_dir,
        host=wanted.host,
        port=port,
        served_name=wanted.model,
        log_path=log,
        api_key=None if wanted.key is None else wanted.key.get_secret_value(),  # an empty key is one
        heirs=records.path(runs),
    )
    with _stopped_on_failure(runs, started.pid):
        endpoint = Endpoint(
            url=started.url,
            pid=started.pid,
            born=birth(started.pid) or 0.0,
            host=wanted.host,
            port=port,
            model=wanted.model,
            version=wanted.version,
            digest=wanted.digest,
            model_dir=str(wanted.model_dir),
            log=str(log),
        )
        records.write(runs, endpoint, records.CHALLENGER)
        return endpoint, server.wait_ready(started.url, deadline_seconds, started.pid, log)


def _try(
    runs: Path,
    wanted: Wanted,
    port: int,
    prompts: list[Pinned],
    policy: Policy,
    max_tokens: int,
    old: Endpoint | None,
) -> tuple[Endpoint, dict[str, float]] | Rejected:
    """Start the new version, ask it the pinned prompts, decide. A refused version is stopped again."""
    try:
        challenger, ready = start(runs, wanted, port, policy.deadline_seconds)
    except RolloutError as error:
        server.require_address(wanted.host, port)  # whoever took it meanwhile says nothing about the version
        return _refusal(decide(Observation(trouble=str(error)), None, policy).reasons)
    with _stopped_on_failure(runs, challenger.pid):
        key = revealed(wanted.key)
        seen, seconds = observe(challenger.url, wanted.model, prompts, max_tokens, key)
        before = None
        if old and server.is_ready(old.url):
            before, _ = observe(old.url, old.model, prompts, max_tokens, key)
        verdict = decide(seen, before, policy)
    if verdict.decision != "promote":
        server.stop(challenger.pid)
        records.forget(runs, records.CHALLENGER)
        return _refusal(verdict.reasons)
    pinned: dict[str, int] = {"asked": seen.asked, "agreed": seen.agreed, "right": seen.right, "errors": seen.errors}
    measured = {"seconds_until_ready": ready, "seconds_per_answer": seconds}
    return challenger.model_copy(update={"pinned": pinned}), measured


def _take_over(runs: Path, wanted: Wanted, tried: Endpoint, old: Endpoint | None, policy: Policy) -> Endpoint:
    """The promoted version at the address users know; if it fails there, the old one comes back."""
    try:
        endpoint, _ = start(runs, wanted, wanted.port, policy.deadline_seconds)
    except BaseException:
        if old:
            _start_again(runs, old, policy, wanted.key)
        raise
    return endpoint.model_copy(update={"pinned": tried.pinned})


def _start_again(runs: Path, old: Endpoint, policy: Policy, key: SecretStr | None) -> None:
    """The version that served before, at its address."""
    if not Path(old.model_dir).is_dir():
        return
    wanted = Wanted(old.model, old.version, old.digest, Path(old.model_dir), old.host, old.port, key)
    endpoint, _ = start(runs, wanted, old.port, policy.deadline_seconds)
    records.keep(runs, endpoint.model_copy(update={"pinned": old.pinned}))


@contextmanager
def _stopped_on_failure(runs: Path, pid: int) -> Iterator[None]:
    try:
        yield
    except BaseException:
        server.stop(pid)
        records.forget(runs, records.CHALLENGER)
        raise


def _healthy(endpoint: Endpoint) -> bool:
    """Whether it answers within `HEALTH_SECONDS`; a busy machine is no reason to restart a server."""
    try:
        server.wait_ready(endpoint.url, HEALTH_SECONDS, endpoint.pid)
    except RolloutError:
        return False
    return True


def _refusal(reasons: tuple[str, ...]) -> Rejected:
    return Rejected(
        "rollout refuses the new version: " + "; ".join(reasons),
        do="The version stays in the registry as challenger; what served before still does.",
    )
