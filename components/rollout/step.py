"""Step `rollout`: the registered version becomes the served one and gets the alias `champion`, or is refused and loses
the alias that asks for it.

It reconciles: when the version is served already, nothing happens; a dead endpoint is started again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from nvila.components.contracts.environment import Environment
from nvila.components.contracts.errors import Rejected
from nvila.components.contracts.manifest import Manifest
from nvila.components.contracts.recipe.rollout import RolloutSettings, Target
from nvila.components.contracts.recipe.section import Section
from nvila.components.contracts.results.accuracy import QuantizedEvaluation
from nvila.components.contracts.results.run import Registration, Rollout
from nvila.components.contracts.step import Outcome
from nvila.components.metrics.pinned import choose
from nvila.components.rollout import kubernetes
from nvila.components.rollout.local import Candidate, reconcile
from nvila.components.runner.execute import Place
from nvila.components.serve.deployment import Version
from nvila.components.tracking.connect import NEEDED_SECONDS, wait_for
from nvila.components.tracking.registry import DIGEST_TAG, challenge, decided, find, promote, refuse


class Settings(Section):
    """Slice of `rollout`."""

    rollout: RolloutSettings


def run(settings: Settings, inputs: Mapping[str, Manifest], out: Path, here: Environment) -> Outcome:
    """Serve the version, if the policy lets it.

    Args:
        settings: target, address and policy.
        inputs: `version` (of register), `model` (of quantize), `metrics` (of evaluate-quantized), `samples`.
        out: stays empty.
        here: whose folder of runs has the endpoint's record, and the key that the endpoint asks for.

    Raises:
        DamagedError: the model's files are not what quantize wrote.
        PreflightError: the port is held by a program that is not ours.
        Rejected: the policy said no, or the registry holds another model under this version.
        RolloutError: the promoted version did not come up at its address, or no controller of the cluster answers.
        ApiError, Cancelled, ConfigError: as of `kubernetes.roll_out`.
    """
    return ACTS[settings.rollout.target](settings.rollout, inputs, here)


def _none(rollout: RolloutSettings, inputs: Mapping[str, Manifest], here: Environment) -> Outcome:
    return Outcome(kind="endpoint", result=_told(inputs["version"].told(Registration), "registered, not rolled out"))


def _local(rollout: RolloutSettings, inputs: Mapping[str, Manifest], here: Environment) -> Outcome:
    version, runs = inputs["version"].told(Registration), Place.of(here).run_dir.parent
    wait_for(runs, NEEDED_SECONDS)
    _agree(runs, version.name, version.version, inputs["model"])
    served = Version(
        name=version.name,
        version=version.version,
        digest=inputs["model"].digest,
        model_dir=str(inputs["model"].dir("model", fresh=True)),
        settings=rollout.endpoint,
    )
    candidate = Candidate(served, rollout.host, rollout.port, here.api_key)
    prompts = choose(inputs["metrics"], inputs["samples"], rollout.policy.pinned_prompts)
    longest = inputs["metrics"].told(QuantizedEvaluation).max_new_tokens
    challenge(runs, version.name, version.version)
    try:
        made = reconcile(runs, candidate, prompts, rollout.policy, rollout.strategy, longest)
    except Rejected as refused:
        refuse(runs, version.name, version.version, f"rolled back: {refused.what}")
        raise
    promote(runs, version.name, version.version)
    decided(runs, version.name, version.version, "promoted: " + "; ".join(made.reasons))
    told = _told(version, "promoted", endpoint=made.url, pinned=made.pinned, reasons=made.reasons)
    return Outcome(kind="endpoint", result=told, measured=made.measured)


def _kubernetes(rollout: RolloutSettings, inputs: Mapping[str, Manifest], here: Environment) -> Outcome:
    version, runs = inputs["version"].told(Registration), Place.of(here).run_dir.parent
    wait_for(runs, NEEDED_SECONDS)
    _agree(runs, version.name, version.version, inputs["model"])
    asked = kubernetes.Asked(version.name, version.version, datetime.fromisoformat(inputs["version"].created))
    made = kubernetes.roll_out(asked, rollout, runs, here)
    told = _told(version, "promoted", pinned=made.pinned, reasons=made.reasons, hostnames=made.hostnames)
    return Outcome(kind="endpoint", result=told)


ACTS: dict[Target, Callable[[RolloutSettings, Mapping[str, Manifest], Environment], Outcome]] = {
    "local": _local,
    "none": _none,
    "kubernetes": _kubernetes,
}
"""What each target does with the version. What it needs for that stands in `contracts/recipe/rollout.py`."""


def _told(version: Registration, decision: str, **said: Any) -> Rollout:
    whole: dict[str, Any] = {"endpoint": None, "pinned": {}, "reasons": []} | said
    return Rollout(model=version.name, version=version.version, decision=decision, **whole)


def _agree(runs: Path, name: str, number: str, model: Manifest) -> None:
    """Raises:
    Rejected: the registry says that the version holds another model.
    """
    registered = find(runs, name, number)
    digest = registered.tags.get(DIGEST_TAG) if registered else None
    if digest is not None and digest != model.digest:
        raise Rejected(
            f"version {number} of {name} was registered with another model than the one in the store",
            where=model.folder,
            value={"registry": digest[:12], "store": model.digest[:12]},
            do="Find out who changed which. Without the folder, the next run makes and registers the model again.",
        )
