"""The pipeline's own step against the running controller: it asks by the alias, and waits for what is decided."""

from __future__ import annotations

import json
import signal
import threading
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest
from ground import NEEDED, Ground, prepared
from places import variable
from stage import POLICY, STAND_IN, Stage

from nvila.components.contracts.environment import Environment
from nvila.components.contracts.errors import Rejected
from nvila.components.contracts.recipe.rollout import Policy, RolloutSettings
from nvila.components.contracts.site import Site
from nvila.components.kube.cluster import Cluster
from nvila.components.kube.connect import connect
from nvila.components.kube.requests import Requests
from nvila.components.kube.rollouts import Rollouts
from nvila.components.rollout.kubernetes import Asked, Promoted, roll_out

pytestmark = pytest.mark.cluster


@pytest.fixture
def stage() -> Iterator[Stage]:
    """A namespace with the controller and no ModelRollout."""
    for name in NEEDED:
        variable(name)
    with prepared() as ground, Stage(ground, []).standing() as made:
        yield made


def environment(ground: Ground, stage: Stage) -> Environment:
    serving = {
        "image": ground.image,
        "gateway": {"name": "gateway"},
        "hostnames": [stage.host("m")],
        "pods": STAND_IN.pods.model_dump(mode="json", by_alias=True),
    }
    site = Site.read({"NVILA_SITE": json.dumps({"serving": serving})})
    return Environment(kubeconfig=str(stage.kubeconfig), site=site)


def test_a_run_has_its_version_promoted_refused_and_withdrawn(stage: Stage, tmp_path: Path) -> None:
    """Both were tested against a stand-in of the other: a step that waits for what the controller never says hangs."""
    ground, model, here = stage.ground, stage.model("m"), environment(stage.ground, stage)
    rollouts = Rollouts(Cluster(Requests(connect(str(stage.kubeconfig)))))
    policy = {name: getattr(POLICY, name) for name in Policy.model_fields}
    settings = RolloutSettings.model_validate({"target": "kubernetes", "policy": policy})

    def ask(version: int, **behaviour: object) -> Promoted:
        ground.registry.register(model, version, **behaviour)
        return roll_out(Asked(model, str(version), datetime.now(UTC)), settings, tmp_path, here)

    first = ask(1)
    assert first.hostnames == [stage.host("m")] and first.pinned["asked"] == POLICY.pinned_prompts
    assert ground.registry.aliases(model) == {"champion": "1"}

    with pytest.raises(Rejected, match="equal those of the evaluation") as refused:
        ask(2, answers={})
    assert "Version 1 still serves" in refused.value.do
    assert ground.registry.aliases(model) == {"champion": "1"}

    # Only the controller asks it, so the third takes a minute, in which the run is stopped.
    def stop() -> None:
        over = threading.Event()
        while not (made := rollouts.of_model(model)) or made.status.weight == 0:
            over.wait(0.2)
        signal.raise_signal(signal.SIGINT)

    threading.Thread(target=stop, daemon=True).start()
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell's background jobs ignore
    try:
        with pytest.raises(KeyboardInterrupt):
            ask(3)
    finally:
        signal.signal(signal.SIGINT, before)
    assert ground.registry.aliases(model) == {"champion": "1"}
    for _ in range(600):
        if (status := rollouts.of_model(model).status).challenger is None:  # type: ignore[union-attr]
            break
        threading.Event().wait(0.1)
    assert (status.weight, status.phase) == (0, "Serving")
    assert [one.verdict for one in status.decisions] == ["withdrawn", "rolled back", "promoted"]
