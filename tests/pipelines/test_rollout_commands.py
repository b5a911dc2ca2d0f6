"""`nvila rollouts` and `nvila rollback` on an API server of this process."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from apiserver import NAMESPACE, ApiServer, forbidden, rollout_path, running
from typer.testing import CliRunner, Result

from nvila.components.contracts.errors import ConfigError, PreflightError
from nvila.components.kube.errors import Away, Denied, NotServed
from nvila.pipelines.cli import app

SERVED = {"version": "6", "digest": "a" * 64, "since": "2026-11-28T01:00:00.000Z"}
TRIED = SERVED | {"version": "7", "digest": "b" * 64, "step": 2, "stepSince": "2026-11-28T02:00:00.000Z"}
DECIDED = {
    "at": "2026-11-27T01:00:00.000Z",
    "verdict": "rolled back",
    "version": "5",
    "insteadOf": "4",
    "reasons": ["3 of 40 requests failed at 25 per cent, more than 0%"],
    "step": 2,
    "weight": 25,
    "counted": {"requests": 40, "errors": 3, "firstTokens": 37, "firstTokenSeconds": 3.7},
    "championCounted": {"requests": 120},
    "pinned": {"asked": 12, "agreed": 11, "right": 9},
}
STATUS = {
    "phase": "Shifting",
    "message": "version 7 has 25 per cent",
    "champion": SERVED,
    "challenger": TRIED,
    "previous": SERVED | {"version": "4"},
    "step": 2,
    "steps": 4,
    "weight": 25,
    "decisions": [DECIDED],
    "conditions": [{"type": "Ready", "status": "True", "reason": "Serves", "lastTransitionTime": "t", "message": "m"}],
    "ofALaterController": {"x": 1},
}
Nvila = Callable[..., Result]


@pytest.fixture
def server() -> Iterator[ApiServer]:
    with running() as found:
        yield found


@pytest.fixture
def nvila(server: ApiServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Nvila:
    monkeypatch.setenv("KUBECONFIG", server.kubeconfig(tmp_path))
    return lambda *words: CliRunner().invoke(app, [*words])


def test_the_table_tells_each_model_in_a_line(server: ApiServer, nvila: Nvila) -> None:
    """Whoever is woken looks here first; an object that no controller has seen yet must not break it."""
    server.rollout("small", STATUS, hostnames=["ask.example"])
    server.rollout("another", model="Other_1", paused=True)
    lines = nvila("rollouts").stdout.splitlines()
    assert lines[0].split() == ["name", "model", "phase", "champion", "challenger", "step", "weight", "message"]
    assert lines[1].split() == ["another", "Other_1", "Empty", "(paused)", "-", "-", "-", "0%"]
    assert lines[2].split()[:7] == ["small", "small", "Shifting", "6", "7", "2/4", "25%"]
    assert lines[2].endswith("version 7 has 25 per cent") and len(lines) == 3


@pytest.mark.parametrize("name", ["small", "Small_Model"])
def test_one_is_told_with_its_reasons_by_either_name(server: ApiServer, nvila: Nvila, name: str) -> None:
    """The registry's name and the cluster's differ; both stand in messages."""
    server.rollout("small", STATUS, model="Small_Model", hostnames=["ask.example"])
    said = nvila("rollouts", name).stdout
    for words in (
        "modelrollout/small in namespace team-a: model Small_Model, Shifting",
        "asked at ask.example",
        "champion: version 6 (aaaaaaaaaaaa) since 2026-11-28T01:00:00.000Z",
        "challenger: version 7 (bbbbbbbbbbbb) since 2026-11-28T01:00:00.000Z, step 2 of 4, 25 per cent",
        "previous: version 4",
        "Ready True (Serves) since t: m",
        "version 5 rolled back (version 4 served), step 2, 25 per cent",
        "3 of 40 requests failed at 25 per cent, more than 0%",
        "its requests: 40, 3 failed, 0.100 s to the first token",
        "the champion's requests: 120, 0 failed",
        "pinned prompts: 11 of 12 as evaluated, 9 right, 0 failed",
    ):
        assert words in said


def test_programs_get_the_same(server: ApiServer, nvila: Nvila) -> None:
    """A dashboard must not have to read columns."""
    server.rollout("small", STATUS, hostnames=["ask.example"])
    every, one = (json.loads(nvila("rollouts", *words, "--json").stdout) for words in ([], ["small"]))
    assert every == {"namespace": NAMESPACE, "rollouts": [one]}
    assert (one["model"], one["challenger"]["version"], one["hostnames"]) == ("small", "7", ["ask.example"])
    assert one["decisions"][0]["counted"]["errors"] == 3 and "pending" not in one


def test_the_namespace_may_be_another(server: ApiServer, nvila: Nvila) -> None:
    """A context names one namespace, teams have several."""
    server.rollout("small", STATUS)
    assert nvila("rollouts", "--namespace", "team-b").stdout == "namespace team-b has no ModelRollout\n"


def test_rollback_asks_for_the_version_before(server: ApiServer, nvila: Nvila) -> None:
    """It must say nothing else of the object: replicas that people have raised would go with it."""
    one = server.rollout("small", STATUS, pods={"replicas": 3})
    said = nvila("rollback", "small", "--reason", "wrong language").stdout
    assert "asked for version 4 in place of version 6" in said
    assert one["spec"]["override"] == {"version": "4", "reason": "wrong language"}
    assert one["spec"]["pods"] == {"replicas": 3}
    assert "override: version 4, not acted on yet: wrong language" in nvila("rollouts", "small").stdout
    told = json.loads(nvila("rollback", "small", "--to", "2", "--reason", "r", "--json").stdout)
    assert told == {"name": "small", "namespace": NAMESPACE, "serves": "6", "wanted": "2"}
    assert one["spec"]["override"] == {"version": "2", "reason": "r"}


@pytest.mark.parametrize(
    ("status", "words", "why"),
    [
        ({"previous": None}, [], "nothing has served before.*--to 6 only withdraws version 7"),
        ({"challenger": None}, ["--to", "6"], r"serves already \(got '6'\)"),
        ({}, ["--to", "champion"], "--to: "),
        ({}, ["--reason", ""], "--reason: "),
        ({"overridden": {"version": "4", "reason": "r"}}, [], "asked for before"),
    ],
)
def test_a_rollback_that_would_change_nothing_is_refused(
    server: ApiServer, nvila: Nvila, status: dict[str, Any], words: list[str], why: str
) -> None:
    """At night a command that seems to work and does not costs an hour."""
    one = server.rollout("small", {name: value for name, value in (STATUS | status).items() if value})
    with pytest.raises(ConfigError, match=why):
        raise nvila("rollback", "small", "--reason", "r", *words).exception or AssertionError
    assert "override" not in one["spec"]


def test_a_version_that_is_tried_can_be_withdrawn(server: ApiServer, nvila: Nvila) -> None:
    """Naming what serves is the way to end a trial without the registry."""
    one = server.rollout("small", STATUS)
    assert nvila("rollback", "small", "--to", "6", "--reason", "r").exit_code == 0
    assert one["spec"]["override"]["version"] == "6"


def test_what_is_in_the_way_is_told(
    server: ApiServer, nvila: Nvila, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No such object, no right, no definition, no server, no cluster: five remedies."""

    def failure(*words: str) -> BaseException:
        return nvila(*words).exception or AssertionError("it worked")

    server.rollout("small")
    for words in (("rollouts", "smal"), ("rollback", "Smal_1", "--reason", "r")):
        with pytest.raises(ConfigError, match=r"no such ModelRollout.*There are: small\."):
            raise failure(*words)
    for name in ("small", "two"):
        server.rollout(name, model="Two_Of_It")
    with pytest.raises(ConfigError, match="'small', 'two'"):
        raise failure("rollouts", "Two_Of_It")
    server.refuse = {rollout_path("").rstrip("/"): forbidden("modelrollouts.nvila.io")}
    with pytest.raises(Denied, match=r"cannot list resource.*Ask whoever keeps the cluster"):
        raise failure("rollouts")
    server.refuse, server.served = {}, {}
    with pytest.raises(NotServed, match="controller\.enabled"):
        raise failure("rollouts")
    server.away = True
    with pytest.raises(Away, match="does not answer"):
        raise failure("rollouts")
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "none"))
    with pytest.raises(PreflightError, match="no cluster is configured"):
        raise failure("rollouts")
