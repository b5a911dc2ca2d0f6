"""Rollouts on this machine: the real supervisor and the real Envoy, servers that behave as a test wants."""

from __future__ import annotations

import itertools
import json
import math
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from load import Request, Steady, chat, send
from pydantic import SecretStr
from servable import WITH_VLLM
from stand_in import write_folder, write_interpreter

from nvila.components.contracts.errors import DamagedError, PreflightError, Rejected, RolloutError
from nvila.components.contracts.manifest import Manifest, describe_files
from nvila.components.contracts.recipe.endpoint import EndpointSettings
from nvila.components.contracts.recipe.rollout import Policy, Strategy
from nvila.components.metrics.pinned import Pinned
from nvila.components.rollout import local
from nvila.components.rollout.local import Candidate, Served, reconcile
from nvila.components.serve import deployment, interpreter, server
from nvila.components.serve.deployment import Decision, Status, Version, Wanted
from nvila.components.serve.ports import free_port

pytestmark = WITH_VLLM[1:]  # Envoy lies in the serving environment

NUMBERS = itertools.count(2)
"""Of versions beside one endpoint: another behaviour is another version."""
PROMPTS = [Pinned(f"d/heldout/{i}", (f"question {i}",), "7", "7") for i in range(4)]
GOOD = {f"question {i}": "7" for i in range(4)}
POLICY = Policy(
    pinned_prompts=4, deadline_seconds=20, steps=[50], min_requests=8, min_seconds=1, step_deadline_seconds=30
)


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A runs folder whose servers are stand-ins; everything ends with the test."""
    monkeypatch.setenv("NVILA_SERVE_PYTHON", str(write_interpreter(tmp_path / "bin", interpreter.envoy())))
    yield tmp_path / "runs"
    with deployment.exclusive(tmp_path / "runs"):
        deployment.end(tmp_path / "runs")


@pytest.fixture
def port() -> int:
    return free_port("127.0.0.1")


@pytest.fixture(scope="module")
def endpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, str]]:
    """A runs folder and the address of its version 1, which serves on whatever is tried beside it."""
    runs = tmp_path_factory.mktemp("endpoint") / "runs"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NVILA_SERVE_PYTHON", str(write_interpreter(runs.parent / "bin", interpreter.envoy())))
        yield runs, roll(runs, candidate(runs, free_port("127.0.0.1"), "1")).url
        with deployment.exclusive(runs):
            deployment.end(runs)


def candidate(runs: Path, port: int, version: str, key: str | None = None, **behaviour: Any) -> Candidate:
    folder = write_folder(runs.parent / f"model-{version}", default=version, **{"answers": GOOD, **behaviour})
    made = Version(name="small", version=version, digest=f"digest-{version}", model_dir=str(folder))
    return Candidate(made, "127.0.0.1", port, None if key is None else SecretStr(key))


def roll(
    runs: Path, target: Candidate, policy: Policy = POLICY, strategy: Strategy = "side-by-side", asked: int = 4
) -> Served:
    return reconcile(runs, target, PROMPTS[:asked], policy, strategy, 8)


def status(runs: Path) -> Status:
    found = deployment.running(runs)
    assert found is not None
    return found


def answered_by(port: int, key: str = "") -> str:
    """The version that answers a user."""
    reply = send(f"http://127.0.0.1:{port}", chat("small", "who?"), key=key)
    assert reply.answered, reply
    return str(json.loads(reply.body)["choices"][0]["message"]["content"])


def users() -> Iterator[Request]:
    for number in itertools.count():
        yield chat("small", "who?", stream=number % 2 == 1)


def test_first_version_is_served_and_a_second_run_leaves_it_alone(runs: Path, port: int) -> None:
    """Running again must not restart a healthy endpoint under its users."""
    first = roll(runs, candidate(runs, port, "1"))
    assert first.url == f"http://127.0.0.1:{port}" and answered_by(port) == "1"
    assert first.pinned == {"asked": 4, "errors": 0, "agreed": 4, "right": 4, "without_value": 0}
    before = status(runs)
    again = roll(runs, candidate(runs, port, "1"))
    assert (again.url, again.pinned) == (first.url, first.pinned) and "already" in again.reasons[0]
    assert [one.pid for one in status(runs).versions] == [one.pid for one in before.versions]
    moved = replace(candidate(runs, port, "1"), port=free_port("127.0.0.1"))
    assert roll(runs, moved).url.endswith(str(moved.port)) and answered_by(moved.port) == "1"
    assert [one.pid for one in status(runs).versions] == [one.pid for one in before.versions]


def test_what_is_served_and_answers_otherwise_is_not_promoted(runs: Path, port: int) -> None:
    """A model that answered `!!!!` was promoted, with none of the prompts asked, since it was served already."""
    changed = GOOD | {"question 3": "!!!!"}
    three, most = (POLICY.model_copy(update={"pinned_prompts": n, "min_agreement": 0.9}) for n in (3, 4))
    roll(runs, candidate(runs, port, "1", answers=changed), three, asked=3)
    with pytest.raises(Rejected, match="is served does not answer as it was evaluated: 3 of 4"):
        roll(runs, candidate(runs, port, "1", answers=changed), most)
    decision = deployment.read(runs, Decision)
    assert decision is not None and decision.decision == "rolled back" and "3 of 4" in decision.reasons[0]


def test_no_request_is_lost_to_a_good_version(runs: Path, port: int) -> None:
    """A rollout took the endpoint down for 58 seconds: 197 of 409 requests of a steady client failed."""
    url = roll(runs, candidate(runs, port, "1", token=0.05)).url
    with Steady(url, users()) as client:
        made = roll(runs, candidate(runs, port, "2"))
        time.sleep(0.5)
    assert client.lost == [] and len(client.replies) > 20
    assert answered_by(port) == "2" and made.url == url and "at 50 per cent" in made.reasons[-1]
    by = [json.loads(r.body)["choices"][0]["message"]["content"] for r in client.replies if b"DONE" not in r.body]
    assert by[0] == "1" and by[-1] == "2" and "1" in by[by.index("2") :], "both have answered, side by side"
    decision = deployment.read(runs, Decision)
    assert decision is not None and (decision.version.version, decision.decision) == ("2", "promoted")
    deadline = time.monotonic() + 30
    while [one.version.version for one in status(runs).versions] != ["2"]:
        assert time.monotonic() < deadline, "the old server stays and eats memory"
        time.sleep(0.1)


@pytest.mark.parametrize(
    ("behaviour", "reason", "lost"),
    [
        ({"answers": dict.fromkeys(GOOD, "9")}, "0 of 4 answers equal", 0),
        ({"answers": {"question 0": "7"}, "fails": True}, "3 of 4 requests failed", 0),
        ({"logprob": math.nan}, "4 of 4 answers have logits that are infinite or not numbers", 0),
        ({"logprob": -9999.0}, "4 of 4 answers have logits", 0),
        ({"dies": "no such weights"}, "ended by itself, once: .*no such weights", 0),
        ({"hangs": True}, "not ready after", 0),
        ({"fails": True}, "requests failed at 50 per cent", 0),
        ({"resets": True}, "requests failed at 50 per cent", 0),
        ({"slow": 0.5}, "s to the first token, more than 2 times the champion's", 0),
        ({"ends": True}, "ended by itself, once|requests failed", None),
        ({"breaks": True}, "requests failed at 50 per cent", None),
    ],
)
def test_a_bad_version_is_rolled_back(
    endpoint: tuple[Path, str], behaviour: dict[str, Any], reason: str, lost: int | None
) -> None:
    """A bad version reached the address, or its trial cost users their answers."""
    (runs, url), number = endpoint, str(next(NUMBERS))
    port = int(url.rpartition(":")[2])
    policy = POLICY.model_copy(update={"deadline_seconds": 2.0 if "hangs" in behaviour else 20.0})
    with Steady(url, users(), clients=4) as client, pytest.raises(Rejected, match=reason) as refusal:
        roll(runs, candidate(runs, port, number, **behaviour), policy)
    assert refusal.value.exit_code == 3
    # What cannot be helped is a stream whose first byte came from the new version.
    begun = [reply for reply in client.lost if reply.status == 200 and b"data:" in reply.body]
    assert len(client.lost) == (len(begun) if lost is None else lost), client.lost
    assert answered_by(port) == "1"
    decision = deployment.read(runs, Decision)
    assert decision is not None and decision.decision == "rolled back" and decision.reasons


def test_refused_first_version_leaves_nothing_that_answers(runs: Path, port: int) -> None:
    """A refused model must not be served because there is no other."""
    with pytest.raises(Rejected, match="0 of 4 answers equal"):
        roll(runs, candidate(runs, port, "1", answers=dict.fromkeys(GOOD, "9")))
    assert send(f"http://127.0.0.1:{port}", chat("small", "who?")).status in (0, 503)
    assert roll(runs, candidate(runs, port, "2")).url and answered_by(port) == "2"


def test_dead_champion_comes_back_when_the_new_version_is_refused(runs: Path, port: int) -> None:
    """After a reboot nothing runs: with the challenger refused, the champion is to serve, not nobody."""
    roll(runs, candidate(runs, port, "1"))
    wanted = deployment.read(runs, Wanted)
    assert wanted is not None
    with deployment.exclusive(runs):
        deployment.end(runs)
    deployment.write(runs, wanted)
    with pytest.raises(Rejected):
        roll(runs, candidate(runs, port, "2", answers=dict.fromkeys(GOOD, "9")))
    deadline = time.monotonic() + 20
    while send(f"http://127.0.0.1:{port}", chat("small", "who?")).status != 200:
        assert time.monotonic() < deadline
    assert answered_by(port) == "1"


@pytest.mark.parametrize("good", [True, False])
def test_replace_stops_the_old_version_first(runs: Path, port: int, good: bool) -> None:
    """Where memory holds one model only, a second one beside it would end both."""
    roll(runs, candidate(runs, port, "1"))
    seen: list[int] = []
    done = threading.Event()

    def watch() -> None:
        while not done.wait(0.02):
            now = deployment.running(runs)
            seen.append(sum(one.alive for one in now.versions) if now else 0)

    watching = threading.Thread(target=watch)
    watching.start()
    try:
        if good:
            roll(runs, candidate(runs, port, "2"), strategy="replace")
        else:
            with pytest.raises(Rejected):
                roll(runs, candidate(runs, port, "2", answers={}), strategy="replace")
            deployment.wait_for(runs, 0, local._champion_is_ready, 20)
    finally:
        done.set()
        watching.join()
    assert max(seen) == 1
    assert answered_by(port) == ("2" if good else "1")


def test_memory_that_does_not_hold_both_is_told_before(runs: Path, port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The system would end one of the two, likely the one that serves."""
    roll(runs, candidate(runs, port, "1"))
    monkeypatch.setattr(local.memory, "available_bytes", lambda: 2**30)
    with pytest.raises(PreflightError, match=r"rollout\.strategy: .* 1\.0 GiB are available.*`replace`"):
        roll(runs, candidate(runs, port, "2"))
    assert answered_by(port) == "1"


def test_port_of_another_program(runs: Path, port: int) -> None:
    """The program that holds the port is not ours to stop, and the version is not to blame."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", port))
        taken.listen()
        with pytest.raises(PreflightError, match="in use"):
            roll(runs, candidate(runs, port, "1"))
    assert deployment.running(runs) is None


def test_another_key_is_another_endpoint(runs: Path, port: int) -> None:
    """A key that was set later was ignored: the endpoint stayed open to everyone."""
    roll(runs, candidate(runs, port, "1"))
    before = status(runs).versions[0].pid
    roll(runs, candidate(runs, port, "1", key="sesame"))
    assert status(runs).versions[0].pid != before and answered_by(port, "sesame") == "1"
    assert "sesame" not in "".join(p.read_text() for p in (runs / "serving").glob("*.json"))
    roll(runs, candidate(runs, port, "1", key="sesame"))


def test_other_settings_are_another_server(runs: Path, port: int) -> None:
    """Limits that were changed in the recipe did not reach the endpoint that was running."""
    roll(runs, candidate(runs, port, "1"))
    changed = candidate(runs, port, "1")
    changed = replace(changed, version=changed.version.model_copy(update={"settings": EndpointSettings(max_media=1)}))
    before = status(runs).versions[0].pid
    roll(runs, changed)
    assert status(runs).versions[-1].pid != before


def written(runs: Path, port: int, version: str) -> Candidate:
    """A version whose folder a step wrote: its manifest lies beside it."""
    folder = runs.parent / "store" / "quantize" / version
    write_folder(folder / "model", answers=GOOD)
    made = Manifest(step="quantize", key=version * 64, kind="model", files=describe_files(folder))
    made.save(folder / "manifest.json")
    served = Version(name="small", version=version, digest=made.digest, model_dir=str(folder / "model"))
    return Candidate(served, "127.0.0.1", port)


@pytest.mark.parametrize("harm", ["a byte", "a file more", "the manifest", "another model"])
def test_what_is_started_is_what_was_written(runs: Path, port: int, harm: str) -> None:
    """A weight changed in place was served with exit code 0."""
    target = written(runs, port, "1")
    folder = Path(target.version.model_dir)
    if harm == "a byte":
        path = folder / "behaviour.json"
        path.write_text(path.read_text().replace("7", "8"))
    elif harm == "a file more":
        (folder / "model-00002.safetensors").touch()
    elif harm == "the manifest":
        (folder.parent / "manifest.json").write_text("")
    else:
        target = replace(target, version=target.version.model_copy(update={"digest": "d" * 64}))
    with pytest.raises(DamagedError, match="quantize/1"):
        roll(runs, target)
    assert deployment.running(runs) is None


def test_a_champion_that_was_changed_is_not_started_again(runs: Path, port: int) -> None:
    """A restart is the one start that nobody watches: it must not bring back other weights."""
    target = written(runs, port, "1")
    roll(runs, target)
    path = Path(target.version.model_dir) / "behaviour.json"
    path.write_text(path.read_text().replace("7", "8"))
    server.stop(status(runs).versions[0].pid)
    deadline = time.monotonic() + 20
    while "quantize/1" not in status(runs).versions[0].ended:
        assert time.monotonic() < deadline, status(runs)
        time.sleep(0.1)
    assert status(runs).versions[0].state == "waiting"


STEP = """
import sys
from pathlib import Path
sys.path[:0] = sys.argv[3:]
from nvila.components.contracts.environment import Environment, entered
from test_rollout_local import candidate, roll

with entered(Environment.read()):
    print("begun", flush=True)
    roll(Path(sys.argv[1]), candidate(Path(sys.argv[1]), int(sys.argv[2]), "2", hangs=True))
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_rollout_that_is_ended_leaves_the_champion_alone(runs: Path, port: int, number: signal.Signals) -> None:
    """A version that was being tried stayed, with its memory, until a next rollout, if there was one."""
    roll(runs, candidate(runs, port, "1"))
    command = [sys.executable, "-c", STEP, str(runs), str(port), *sys.path]
    step = subprocess.Popen(command, stdout=subprocess.PIPE, env=os.environ | {"NVILA_PROGRESS": ""})
    deployment.wait_for(runs, 0, lambda now: now.of("challenger") is not None, 30)
    step.send_signal(number)
    step.wait()
    deployment.wait_for(runs, 0, lambda now: [one.version.version for one in now.versions] == ["1"], 30)
    assert answered_by(port) == "1"


def test_a_stop_ends_the_rollout_too(runs: Path, port: int) -> None:
    """`nvila stop` waited for the rollout, or was undone by it."""
    roll(runs, candidate(runs, port, "1"))
    ended: list[BaseException] = []

    def try_it() -> None:
        try:
            roll(runs, candidate(runs, port, "2", hangs=True))
        except BaseException as error:
            ended.append(error)

    trial = threading.Thread(target=try_it)
    trial.start()
    deployment.wait_for(runs, 0, lambda now: now.of("challenger") is not None, 30)
    with deployment.exclusive(runs):
        deployment.end(runs)
    trial.join(30)
    assert isinstance(ended[0], RolloutError) and "somebody else" in str(ended[0])
    assert deployment.running(runs) is None
