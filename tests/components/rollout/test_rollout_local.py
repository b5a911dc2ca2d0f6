from __future__ import annotations

import json
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr

from nvila.components.contracts.errors import DamagedError, PreflightError, Rejected, RolloutError
from nvila.components.contracts.manifest import Manifest, describe_files
from nvila.components.contracts.recipe.rollout import Policy
from nvila.components.rollout import local
from nvila.components.rollout.local import Served, Wanted, reconcile
from nvila.components.rollout.pinned import Pinned
from nvila.components.serve import endpoint as records
from nvila.components.serve import server
from nvila.components.serve.endpoint import Endpoint, exclusive
from nvila.components.serve.ports import free_port

FAKE = """
import json, sys, pathlib
from http.server import BaseHTTPRequestHandler, HTTPServer
answers = json.loads(pathlib.Path(sys.argv[1], "answers.json").read_text())
if answers.get("die"): sys.exit("no such weights")
class Handler(BaseHTTPRequestHandler):
    def log_message(self, *args): pass
    def do_GET(self):
        hangs = pathlib.Path(sys.argv[1], "hang").exists() or answers.get("hang")
        self.send_response(503 if hangs else 200); self.end_headers()
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        question = body["messages"][0]["content"][-1]["text"]
        self.send_response(200 if question in answers else 500); self.end_headers()
        said = {"choices": [{"message": {"content": answers.get(question)}}]}
        self.wfile.write(json.dumps(said).encode())
HTTPServer((sys.argv[2], int(sys.argv[3])), Handler).serve_forever()
"""
PROMPTS = [Pinned(f"d/heldout/{i}", (f"question {i}",), "7", "7") for i in range(4)]
POLICY = Policy(pinned_prompts=4, deadline_seconds=10)
GOOD = {f"question {i}": "7" for i in range(4)}
BAD = {f"question {i}": "9" for i in range(4)}


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A runs folder; servers are small real processes in place of vLLM and end with the test."""
    started: list[int] = []

    def start(model_dir: Path, *, host: str, port: int, log_path: Path, **_: Any) -> server.Server:
        server.require_address(host, port)
        with log_path.open("ab") as log:
            command = [sys.executable, "-c", FAKE, str(model_dir), host, str(port)]
            child = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
        started.append(child.pid)
        return server.Server(child.pid, f"http://{host}:{port}")

    monkeypatch.setattr(server, "start", start)
    yield tmp_path / "runs"
    for pid in started:
        server.stop(pid)


@pytest.fixture
def port() -> int:
    return free_port("127.0.0.1")


def wanted(runs: Path, port: int, version: str, answers: dict[str, Any]) -> Wanted:
    folder = runs.parent / f"model-{version}"
    folder.mkdir(exist_ok=True)
    (folder / "answers.json").write_text(json.dumps(answers))
    return Wanted("small", version, f"digest-{version}", folder, "127.0.0.1", port, None)


def roll(runs: Path, target: Wanted, policy: Policy = POLICY) -> Served:
    with exclusive(runs):
        return reconcile(runs, target, PROMPTS, policy, 8)


def serving(runs: Path) -> Endpoint:
    found = records.read(runs)
    assert found is not None and found.alive and server.is_ready(found.url)
    return found


def test_first_version_is_served_and_a_second_run_leaves_it_alone(runs: Path, port: int) -> None:
    """Running again must not restart a healthy endpoint under its users."""
    first = roll(runs, wanted(runs, port, "1", GOOD)).endpoint
    assert first.pinned == {"asked": 4, "agreed": 4, "right": 4, "errors": 0}
    again = roll(runs, wanted(runs, port, "1", GOOD)).endpoint
    assert again == first == serving(runs)
    assert first.url == f"http://127.0.0.1:{port}"
    assert records.read(runs, records.CHALLENGER) is None


def test_dead_endpoint_is_started_again(runs: Path, port: int) -> None:
    """After a reboot the next run must bring the endpoint back, at the same address."""
    first = roll(runs, wanted(runs, port, "1", GOOD)).endpoint
    server.stop(first.pid)
    second = roll(runs, wanted(runs, port, "1", GOOD)).endpoint
    assert second.pid != first.pid
    assert serving(runs).url == first.url


def test_hanging_endpoint_is_replaced(runs: Path, port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that lives but does not answer is not an endpoint."""
    first = roll(runs, wanted(runs, port, "1", GOOD)).endpoint
    hang = Path(first.model_dir, "hang")
    hang.touch()
    monkeypatch.setattr(local, "HEALTH_SECONDS", 1.0)
    monkeypatch.setattr(server, "stop", lambda pid, stop=server.stop: (stop(pid), hang.unlink(missing_ok=True)))
    second = roll(runs, wanted(runs, port, "1", GOOD)).endpoint
    assert second.pid != first.pid
    assert not first.alive


def test_better_version_takes_the_address_over(runs: Path, port: int) -> None:
    """Users keep their URL, and the old server does not stay behind and eat memory."""
    old = roll(runs, wanted(runs, port, "1", GOOD)).endpoint
    new = roll(runs, wanted(runs, port, "2", GOOD)).endpoint
    assert (new.url, new.version) == (old.url, "2")
    assert serving(runs) == new
    assert not old.alive
    assert records.read(runs, records.CHALLENGER) is None


def test_rejected_version_leaves_the_old_one_untouched(runs: Path, port: int) -> None:
    """A bad model must never reach the address."""
    old = roll(runs, wanted(runs, port, "1", GOOD)).endpoint
    with pytest.raises(Rejected, match="0 of 4 answers equal") as refusal:
        roll(runs, wanted(runs, port, "2", BAD))
    assert refusal.value.exit_code == 3
    assert serving(runs) == old
    assert records.read(runs, records.CHALLENGER) is None


def test_rejected_version_brings_a_dead_predecessor_back(runs: Path, port: int) -> None:
    """With the champion down and the challenger refused, serving the champion is right; serving nothing is not."""
    old = roll(runs, wanted(runs, port, "1", GOOD)).endpoint
    server.stop(old.pid)
    with pytest.raises(Rejected):
        roll(runs, wanted(runs, port, "2", BAD))
    assert serving(runs).version == "1"


def test_rejected_first_version_leaves_nothing_running(runs: Path, port: int) -> None:
    """A refused server must not hold the port."""
    with pytest.raises(Rejected, match="4 of 4 requests failed"):
        roll(runs, wanted(runs, port, "1", {}))
    server.require_address("127.0.0.1", port)
    assert records.read(runs) is None


@pytest.mark.parametrize(("answers", "reason"), [({"die": 1}, "no such weights"), ({"hang": 1}, "not ready within")])
def test_version_that_never_gets_ready_is_refused(runs: Path, port: int, answers: dict[str, Any], reason: str) -> None:
    """The reason must be the server's own last words, and no process may stay behind."""
    with pytest.raises(Rejected, match=reason):
        roll(runs, wanted(runs, port, "1", answers), POLICY.model_copy(update={"deadline_seconds": 2.0}))
    server.require_address("127.0.0.1", port)


def test_too_few_prompts_promote_nothing(runs: Path, port: int) -> None:
    """Four answers cannot satisfy a policy that asks for twelve."""
    with pytest.raises(Rejected, match="too few"):
        roll(runs, wanted(runs, port, "1", GOOD), Policy(pinned_prompts=12))


def test_port_of_another_program_is_refused(runs: Path, port: int) -> None:
    """Exit code 2 and the other program keeps running; nothing is started on some other port instead."""
    with socket.socket() as other:
        other.bind(("127.0.0.1", port))
        other.listen()
        with pytest.raises(PreflightError, match=str(port)):
            roll(runs, wanted(runs, port, "1", GOOD))


def test_a_port_that_was_taken_meanwhile_rejects_no_version(
    runs: Path, port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM binds its port seconds after it was found free: exit code 3 would blame the model for another program."""
    roll(runs, wanted(runs, port, "1", GOOD))
    with socket.socket() as other:

        def take(url: str, deadline_seconds: float, pid: int, log_path: Path | None = None) -> float:
            server.stop(pid)
            other.bind(("127.0.0.1", int(url.rpartition(":")[2])))
            other.listen()
            raise RolloutError("the server ended while starting: address already in use")

        monkeypatch.setattr(server, "wait_ready", take)
        with pytest.raises(PreflightError, match="in use"):
            roll(runs, wanted(runs, port, "2", GOOD))
    assert serving(runs).version == "1"


@pytest.mark.parametrize(("key", "given"), [(None, None), (SecretStr(""), ""), (SecretStr("k"), "k")])
def test_a_key_that_is_set_and_empty_is_a_key(
    runs: Path, port: int, monkeypatch: pytest.MonkeyPatch, key: SecretStr | None, given: str | None
) -> None:
    """`NVILA_API_KEY=` of a script whose secret is missing opened the endpoint to everyone."""
    keys: list[str | None] = []
    start = server.start
    monkeypatch.setattr(
        server, "start", lambda *a, **options: (keys.append(options["api_key"]), start(*a, **options))[1]
    )
    roll(runs, replace(wanted(runs, port, "1", GOOD), key=key))
    assert keys == [given]


def test_record_of_a_reused_process_id_is_not_ours(runs: Path, port: int) -> None:
    """After a reboot the recorded id may be any program: it must be neither trusted nor killed."""
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        stale = Endpoint(
            url=f"http://127.0.0.1:{port}", pid=child.pid, born=1.0, host="127.0.0.1", port=port, model="small",
            version="1", digest="digest-1", model_dir="/gone", log="",
        )  # fmt: skip
        records.write(runs, stale)
        records.write(runs, stale, records.CHALLENGER)
        assert roll(runs, wanted(runs, port, "1", GOOD)).endpoint.pid != child.pid
        assert child.poll() is None
    finally:
        child.kill()
        child.wait()


def test_orphan_of_a_killed_run_is_cleared(runs: Path, port: int) -> None:
    """A run killed while it tried a version leaves a server that nobody else would stop."""
    orphan = roll(runs, wanted(runs, port, "1", GOOD)).endpoint
    records.write(runs, orphan, records.CHALLENGER)
    records.forget(runs)
    assert roll(runs, wanted(runs, port, "1", GOOD)).endpoint.pid != orphan.pid
    assert not orphan.alive


def test_old_version_returns_when_the_new_one_fails_at_the_address(
    runs: Path, port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between stopping the old and starting the new something may break; users must not be left without a server."""
    roll(runs, wanted(runs, port, "1", GOOD))
    start = server.start

    def refuse_second(model_dir: Path, *, port: int, **rest: Any) -> server.Server:
        if model_dir.name == "model-2" and port == serve_at:
            raise RolloutError("no memory left")
        return start(model_dir, port=port, **rest)

    serve_at = port
    monkeypatch.setattr(server, "start", refuse_second)
    with pytest.raises(RolloutError, match="no memory left"):
        roll(runs, wanted(runs, port, "2", GOOD))
    assert serving(runs).version == "1"


def written(runs: Path, port: int, version: str, answers: dict[str, Any]) -> Wanted:
    """A version whose folder a step wrote: its manifest lies beside it."""
    folder = runs.parent / "store" / "quantize" / version
    (folder / "model").mkdir(parents=True)
    (folder / "model" / "answers.json").write_text(json.dumps(answers))
    made = Manifest(step="quantize", key=version * 64, kind="model", files=describe_files(folder))
    made.save(folder / "manifest.json")
    return Wanted("small", version, made.digest, folder / "model", "127.0.0.1", port, None)


@pytest.mark.parametrize("harm", ["a byte", "a file more", "the manifest", "another model"])
def test_what_is_started_is_what_was_written(runs: Path, port: int, harm: str) -> None:
    """A weight changed in place was served with exit code 0."""
    target = written(runs, port, "1", GOOD)
    if harm == "a byte":
        path = target.model_dir / "answers.json"
        path.write_text(path.read_text().replace("7", "8"))
    elif harm == "a file more":
        (target.model_dir / "model-00002.safetensors").touch()
    elif harm == "the manifest":
        (target.model_dir.parent / "manifest.json").write_text("")
    else:
        target = replace(target, digest="d" * 64)
    with pytest.raises(DamagedError, match="quantize/1"):
        roll(runs, target)
    assert records.read(runs) is None


def test_an_old_version_that_was_changed_does_not_come_back(runs: Path, port: int) -> None:
    """The rollback is the one start that nobody watches: it must not bring back other weights."""
    old = written(runs, port, "1", GOOD)
    server.stop(roll(runs, old).endpoint.pid)
    (old.model_dir / "answers.json").write_text(json.dumps(BAD))
    with pytest.raises(DamagedError, match="quantize/1"):
        roll(runs, written(runs, port, "2", BAD), POLICY.model_copy(update={"min_agreement": 0.9}))
    recorded = records.read(runs)
    assert recorded is None or not recorded.alive


NO_PROCESS = json.dumps(
    dict.fromkeys(("url", "host", "model", "version", "digest", "model_dir", "log"), "x")
    | {"pid": -1, "born": 1.0, "port": 1}
).encode()


@pytest.mark.parametrize("content", [b"", b"{", bytes(30), b"\xff", b"[]", NO_PROCESS, None])
def test_a_torn_record_is_no_endpoint(runs: Path, content: bytes | None) -> None:
    """A record that a crash left half ended every further rollout, `serve` and `stop`."""
    path = runs / "serving" / "endpoint.json"
    path.parent.mkdir(parents=True)
    path.mkdir() if content is None else path.write_bytes(content)
    assert records.read(runs) is None
    records.forget(runs)
    assert not path.exists()


STEP = """
import os, signal, sys
from pathlib import Path
from nvila.components.contracts.environment import Environment, entered
from nvila.components.rollout.local import Wanted, start
from nvila.components.serve import endpoint as records

runs, model, port, promoted = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4] == "True"
with entered(Environment.read()):
    tried, _ = start(runs, Wanted("small", "1", "d", model, "127.0.0.1", port, None), port, 60)
    print(tried.model_dump_json(), flush=True)
    if promoted:
        records.keep(runs, tried)
    os.kill(os.getpid(), signal.SIGKILL)
"""
VLLM = """#!/bin/sh
sleep 300 &  # the engine
exec {python} -c {code} "$4" "$7" "$9"
"""


@pytest.mark.parametrize("promoted", [False, True])
def test_a_rollout_that_is_killed_leaves_what_users_talk_to_and_nothing_else(
    tmp_path: Path, port: int, monkeypatch: pytest.MonkeyPatch, promoted: bool
) -> None:
    """A version that was being tried stayed, with its memory and the port, until a next rollout, if there was one."""
    python, model, runs = tmp_path / "python", tmp_path / "model", tmp_path / "runs"
    python.write_text(VLLM.format(python=sys.executable, code=shlex.quote(FAKE)))
    python.chmod(0o755)
    model.mkdir()
    (model / "answers.json").write_text("{}")
    (model / "config.json").write_text('{"nvila": {"num_video_frames": 4}}')
    monkeypatch.setenv("NVILA_SERVE_PYTHON", str(python))
    command = [sys.executable, "-c", STEP, str(runs), str(model), str(port), str(promoted)]
    step = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    assert step.returncode == -signal.SIGKILL
    tried = Endpoint.model_validate_json(step.stdout)
    if promoted:
        time.sleep(0.5)
        assert serving(runs) == tried and records.alive(runs) == [tried]
        server.stop(tried.pid)
    deadline = time.monotonic() + 30
    while tried.alive:
        assert time.monotonic() < deadline, "the server lives on"
        time.sleep(0.05)
    server.require_address("127.0.0.1", port)
