"""The target `kubernetes`: an API server of this process, a real registry, and a test that plays the controller."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from apiserver import SPEC, ApiServer, forbidden, rollout_path, running

from nvila.components.contracts.environment import Environment
from nvila.components.contracts.errors import Cancelled, ConfigError, NvilaError, Preempted, Rejected, RolloutError
from nvila.components.contracts.manifest import Manifest, describe_files
from nvila.components.contracts.results.run import Registration, Rollout
from nvila.components.contracts.site import Site
from nvila.components.kube import requests
from nvila.components.kube.errors import Denied, NotServed
from nvila.components.kube.rollouts import name_for
from nvila.components.rollout import kubernetes
from nvila.components.rollout.step import Settings, run
from nvila.components.tracking import connect
from nvila.components.tracking.connect import connected
from nvila.components.tracking.registry import CHALLENGER, DIGEST_TAG, challenge, find

REGISTERED = datetime.now(UTC).replace(microsecond=0)
SERVING = {
    "image": "r/serve@sha256:1",
    "gateway": {"name": "public", "sectionName": "https"},
    "hostnames": ["ask.example"],
    "pods": {"gpuResource": "amd.com/gpu"},
}
READY = {"type": "Ready", "status": "True", "reason": "r", "lastTransitionTime": "t"}


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[ApiServer]:
    monkeypatch.setattr(kubernetes, "LOOK_SECONDS", 0.02)
    monkeypatch.setattr(requests, "_LONGEST_PAUSE_SECONDS", 0.05)
    with running() as found:
        yield found


@pytest.fixture
def runs(tracked_run: Path) -> Path:
    """A registry with two versions of the model `small`, whose digests are those of `inputs`."""
    with connected(tracked_run.parent) as client:
        client.create_registered_model("small")
        for _ in range(2):
            client.create_model_version("small", source="file:///nowhere")
    return tracked_run.parent


def environment(
    server: ApiServer, folder: Path, serving: dict[str, Any] | None = SERVING, **fields: Any
) -> Environment:
    site = Site.read({"NVILA_SITE": json.dumps({"serving": serving})}) if serving else None
    return Environment(kubeconfig=server.kubeconfig(folder), site=site, run=folder / "runs" / "r1", **fields)


def step(server: ApiServer, folder: Path, here: Environment | None = None, **rollout: Any) -> Rollout:
    """Run the step for version 2; returns what it tells."""
    (folder / "model" / "model").mkdir(parents=True, exist_ok=True)
    told, created = Registration(name="small", version="2", model_uri=""), REGISTERED.isoformat()
    inputs = {
        "version": Manifest(step="register", key="k", kind="version", result=told, created=created),
        "model": Manifest(step="quantize", key="k", kind="model", files=describe_files(folder / "model")),
    }
    settings = Settings.model_validate({"rollout": {"target": "kubernetes"} | rollout})
    result = run(settings, inputs, folder, here or environment(server, folder)).result
    assert isinstance(result, Rollout)
    return result


def decision(verdict: str, version: str = "2", after: float = 1.0, **said: Any) -> dict[str, Any]:
    at = (REGISTERED + timedelta(seconds=after)).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    return {"at": at, "verdict": verdict, "version": version, "reasons": ["why"]} | said


class Controller(threading.Thread):
    """Once `challenger` names a version: writes these status objects, one after the other."""

    def __init__(self, server: ApiServer, runs: Path, *statuses: dict[str, Any], until: str = "2") -> None:
        super().__init__(daemon=True)
        self.server, self.runs, self.statuses, self.until = server, runs, statuses, until
        self.start()

    def run(self) -> None:
        while not ((found := find(self.runs, "small", CHALLENGER)) and found.version == self.until):
            time.sleep(0.02)
        for status in self.statuses:
            (one,) = (found for path, found in self.server.objects.items() if "/modelrollouts/" in path)
            one["status"] = {"observedGeneration": one["metadata"]["generation"]} | status
            time.sleep(0.1)


TRIED = {"version": "2", "digest": "d", "since": "t", "stepSince": "t"}
SHIFTING = {"phase": "Shifting", "challenger": TRIED, "step": 1, "steps": 4, "weight": 5, "message": "5 per cent"}


def test_a_model_without_modelrollout_gets_one_and_is_promoted(
    server: ApiServer, runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The whole way: the object out of recipe and site, the alias, the wait, and what the step tells."""
    promoted = decision("promoted", pinned={"asked": 12, "agreed": 11})
    Controller(server, runs, SHIFTING, {"phase": "Serving", "decisions": [promoted, decision("promoted", "1", -9)]})
    told = step(server, tmp_path, policy={"min_requests": 40}, endpoint={"max_answers": 4})
    pinned = {"asked": 12, "errors": 0, "agreed": 11, "right": 0, "without_value": 0}
    assert (told.decision, told.reasons, told.hostnames) == ("promoted", ["why"], ["ask.example"])
    assert (told.endpoint, told.pinned) == (None, pinned)
    # What the recipe does not say is left to the platform's later versions.
    assert server.objects[rollout_path("small")]["spec"] == SERVING | {
        "model": "small",
        "policy": {"minRequests": 40},
        "endpoint": {"maxAnswers": 4},
    }
    assert "modelrollout/small: made in namespace team-a" in capsys.readouterr().err


def test_what_people_changed_is_left_alone_under_whatever_name(server: ApiServer, runs: Path, tmp_path: Path) -> None:
    """A run at night must not bring back the replicas that somebody raised in the evening, nor a second route."""
    mine = server.rollout("the-one", pods={"replicas": 7}, paused=True)
    server.rollout("of-another", model="other")
    before = json.dumps(mine["spec"])

    def decide() -> None:
        while find(runs, "small", CHALLENGER) is None:
            time.sleep(0.02)
        mine["status"] = {"decisions": [decision("promoted")]}

    threading.Thread(target=decide, daemon=True).start()
    step(server, tmp_path, environment(server, tmp_path, serving=None))
    assert json.dumps(mine["spec"]) == before and mine["metadata"]["generation"] == 1
    assert not any(asked.startswith(("POST", "PATCH")) for asked in server.asked)


def test_two_modelrollouts_of_a_model_are_refused_by_name(server: ApiServer, runs: Path, tmp_path: Path) -> None:
    """Each would move the same aliases."""
    server.rollout("a")
    server.rollout("b")
    with pytest.raises(ConfigError, match=r"'a', 'b'"):
        step(server, tmp_path)
    assert find(runs, "small", CHALLENGER) is None


def test_a_rejection_ends_with_its_reasons(server: ApiServer, runs: Path, tmp_path: Path) -> None:
    """Exit code 3; an older rejection of the same version, by another run, is no answer to this one."""
    older = decision("rolled back", after=-60, reasons=["of the last run"])
    server.rollout("small", {"decisions": [older], "champion": {"version": "1", "digest": "d", "since": "t"}})
    refused = decision("rolled back", weight=25, reasons=["3 of 40 requests failed", "more than 0%"])
    serves = {"champion": {"version": "1", "digest": "d", "since": "t"}}
    Controller(server, runs, SHIFTING, {"decisions": [refused, older]} | serves)
    with pytest.raises(Rejected, match=r"3 of 40 requests failed; more than 0%") as caught:
        step(server, tmp_path)
    assert (caught.value.exit_code, "at 25 per cent" in str(caught.value)) == (3, True)
    assert "Version 1 still serves" in str(caught.value)


def test_a_decision_made_while_nobody_looked_is_found(server: ApiServer, runs: Path, tmp_path: Path) -> None:
    """The pod was moved and KFP has started the step anew: asking again would try a refused version twice."""
    server.rollout("small", {"decisions": [decision("rolled back")]})
    with pytest.raises(Rejected, match="why"):
        step(server, tmp_path)
    assert find(runs, "small", CHALLENGER) is None


def test_what_serves_already_is_not_asked_for(server: ApiServer, runs: Path, tmp_path: Path) -> None:
    """A run that is repeated changes nothing."""
    serves = {"champion": {"version": "2", "digest": "d", "since": "t"}, "conditions": [READY], "phase": "Serving"}
    server.rollout("small", serves, hostnames=["a.example"])
    told = step(server, tmp_path)
    assert (told.reasons, told.hostnames) == (["it is served already"], ["a.example"])
    assert find(runs, "small", CHALLENGER) is None


def _stopped_while_waiting(
    server: ApiServer, runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException,
    before: Callable[[], object] = lambda: None, **fields: Any,
) -> str:  # fmt: skip
    """Have the step stopped at its second look; returns what `challenger` names then."""
    server.rollout("small", SHIFTING)
    looks = 0

    def look(self: Any, name: str) -> Any:
        nonlocal looks
        looks += 1
        if looks > 1:
            before()
            raise error
        return real(self, name)

    real = kubernetes.Rollouts.get
    monkeypatch.setattr(kubernetes.Rollouts, "get", look)
    with pytest.raises(type(error)):
        step(server, tmp_path, environment(server, tmp_path, **fields))
    return found.version if (found := find(runs, "small", CHALLENGER)) else ""


@pytest.mark.parametrize("error", [Preempted("asked to stop"), KeyboardInterrupt(), NvilaError("a fault")])
def test_a_stopped_run_asks_no_more(
    server: ApiServer, runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    """Nobody would be told how the rollout of a cancelled run ended."""
    assert _stopped_while_waiting(server, runs, tmp_path, monkeypatch, error) == ""


def test_a_stopped_run_leaves_what_others_ask_for(
    server: ApiServer, runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another version has been asked for since: its rollout is not this run's to end."""
    stop = Preempted("asked to stop")
    other = lambda: challenge(runs, "small", "1")  # noqa: E731
    assert _stopped_while_waiting(server, runs, tmp_path, monkeypatch, stop, other) == "1"


def test_a_pod_that_is_only_moved_goes_on_asking(
    server: ApiServer, runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Draining the node of a pod that waits must not take a good version from its users."""
    moved = {"conditions": [{"type": "DisruptionTarget", "status": "True"}]}
    server.put("api/v1/namespaces/team-a/pods/step-1", status=moved)
    pod = {"in_cluster": "10.0.0.1", "hostname": "step-1"}
    stop = Preempted("asked to stop")
    assert _stopped_while_waiting(server, runs, tmp_path, monkeypatch, stop, **pod) == "2"


@pytest.mark.parametrize(("to", "said"), [("1", "moved to version 1"), ("", "was removed")])
def test_somebody_else_wants_another_version(server: ApiServer, runs: Path, tmp_path: Path, to: str, said: str) -> None:
    """The step would wait for ever for a decision that nobody is going to make."""
    server.rollout("small", SHIFTING)

    def move() -> None:
        while find(runs, "small", CHALLENGER) is None:
            time.sleep(0.02)
        time.sleep(0.1)
        with connected(runs) as client:
            if to:
                client.set_registered_model_alias("small", CHALLENGER, to)
            else:
                client.delete_registered_model_alias("small", CHALLENGER)

    threading.Thread(target=move, daemon=True).start()
    with pytest.raises(Cancelled, match=said):
        step(server, tmp_path)


def test_a_controller_that_is_away_is_told_and_given_up(
    server: ApiServer, runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run that waits for nobody looks like a slow one."""
    monkeypatch.setattr(kubernetes, "QUIET_SECONDS", 0.2)
    server.rollout("small", policy={"deadlineSeconds": 1})
    with pytest.raises(RolloutError, match=r"no controller has taken notice.*component=controller"):
        step(server, tmp_path)
    assert capsys.readouterr().err.count("no controller has taken notice") == 1
    assert find(runs, "small", CHALLENGER) is None


@pytest.mark.parametrize(
    ("status", "spec"),
    [
        (SHIFTING, {}),
        ({"phase": "Serving"}, {"paused": True}),
        ({"phase": "Blocked", "message": "no Gateway"}, {}),
        ({"conditions": [READY | {"type": "RegistryReachable", "status": "False"}]}, {}),
    ],
)
def test_a_controller_with_a_reason_to_wait_is_waited_for(
    server: ApiServer, runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, status: Any, spec: Any
) -> None:
    """A pause over the weekend, or MLflow's outage, must not fail the run that asked before it."""
    monkeypatch.setattr(kubernetes, "QUIET_SECONDS", 0.0)
    server.rollout("small", status | {"observedGeneration": 1}, policy={"deadlineSeconds": 1}, **spec)
    Controller(server, runs, status, *[status] * 14, {"decisions": [decision("promoted")]})
    assert step(server, tmp_path).decision == "promoted"


def test_outages_of_both_are_waited_out(
    server: ApiServer, runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Neither an upgrade of the control plane nor one of MLflow's is a reason to give a rollout up."""
    server.rollout("small", SHIFTING)

    def outages() -> None:
        while find(runs, "small", CHALLENGER) is None:
            time.sleep(0.02)
        server.away = True
        time.sleep(1.2)
        server.away = False
        monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:1")
        time.sleep(0.5)
        monkeypatch.delenv("MLFLOW_TRACKING_URI")
        server.objects[rollout_path("small")]["status"] = {"decisions": [decision("promoted")]}

    monkeypatch.setattr(connect, "PATIENCE_SECONDS", 0.1)
    threading.Thread(target=outages, daemon=True).start()
    assert step(server, tmp_path).decision == "promoted"
    assert "asking again until it answers" in capsys.readouterr().err


def test_a_registry_that_says_otherwise_is_believed(server: ApiServer, runs: Path, tmp_path: Path) -> None:
    """The version's number names another model than the one that was quantized."""
    with connected(runs) as client:
        client.set_model_version_tag("small", "2", DIGEST_TAG, "f" * 64)
    with pytest.raises(Rejected, match="another model"):
        step(server, tmp_path)
    assert server.asked == []


def test_a_cluster_that_cannot_serve_says_what_to_do(
    server: ApiServer, runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No site, no definition, no right: each has another remedy."""
    monkeypatch.setattr(kubernetes, "Requests", lambda found, advice: requests.Requests(
        found, requests.Patience(denied_seconds=0.0), advice))  # fmt: skip
    with pytest.raises(ConfigError, match=r"NVILA_SITE: serving: .*chart's controller\.enabled"):
        step(server, tmp_path, environment(server, tmp_path, serving=None))
    server.refuse = {"apis/nvila.io": forbidden("modelrollouts.nvila.io")}
    with pytest.raises(Denied, match=r"cannot list resource.*for the right"):
        step(server, tmp_path)
    server.refuse, server.served = {}, {}
    with pytest.raises(NotServed, match="serves no models"):
        step(server, tmp_path)
    assert find(runs, "small", CHALLENGER) is None


def test_the_site_of_a_cluster_is_read_where_no_pod_says_it(server: ApiServer, runs: Path, tmp_path: Path) -> None:
    """`nvila run` on a workstation with a kubeconfig has no `NVILA_SITE`."""
    data = {"NVILA_SITE": json.dumps({"serving": SERVING})}
    server.put("api/v1/namespaces/team-a/configmaps/nvila-site", data=data)
    Controller(server, runs, {"decisions": [decision("promoted")]})
    step(server, tmp_path, environment(server, tmp_path, serving=None))
    assert server.objects[rollout_path("small")]["spec"]["image"] == SPEC["image"]


@pytest.mark.parametrize(
    ("model", "name"),
    [("nvila-tiny", "nvila-tiny"), ("NVILA_8B.v2", r"nvila-8b-v2-[0-9a-f]{6}"), ("8b", r"model-8b-[0-9a-f]{6}"),
     ("a" * 150, r"a{40}-[0-9a-f]{6}")],
)  # fmt: skip
def test_names_that_kubernetes_takes(model: str, name: str) -> None:
    """MLflow takes more than Kubernetes; two models must not meet in one name."""
    import re

    assert re.fullmatch(name, name_for(model)) and len(name_for(model)) <= 50
    assert name_for("a_b") != name_for("a.b")
