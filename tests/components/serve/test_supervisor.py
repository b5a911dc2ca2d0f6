from __future__ import annotations

import http.client
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from pydantic import SecretStr

from nvila.components.contracts.errors import ConfigError, PreflightError, RolloutError
from nvila.components.contracts.processes import Process
from nvila.components.serve import deployment, envoy, interpreter
from nvila.components.serve.deployment import Guards, Role, Status, Version, Wanted
from nvila.components.serve.ports import free_port
from nvila.pipelines.commands import endpoint

FAKE = """
import json, os, subprocess, sys, threading, time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
folder = Path(sys.argv[1])
if (folder / "die").exists(): sys.exit("no such weights")
engine = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
(folder / "pids").write_text(f"{os.getpid()} {engine.pid}")
threading.Thread(target=lambda: (engine.wait(), os._exit(1)), daemon=True).start()
class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    def log_message(self, *args): pass
    def do_GET(self):
        if (folder / "hang").exists(): time.sleep(600)
        self.answer(b"")
    def do_POST(self):
        asked = self.rfile.read(int(self.headers["content-length"]))
        if asked != b"stream": return self.answer(f"{folder.name} {os.environ.get('VLLM_API_KEY')}".encode())
        self.send_response(200); self.send_header("transfer-encoding", "chunked"); self.end_headers()
        for _ in range(15):
            self.wfile.write(b"5\\r\\nhello\\r\\n"); self.wfile.flush(); time.sleep(0.1)
        self.wfile.write(b"0\\r\\n\\r\\n")
    def answer(self, body):
        self.send_response(200); self.send_header("content-length", str(len(body))); self.end_headers()
        self.wfile.write(body)
ThreadingHTTPServer((sys.argv[2], int(sys.argv[3])), Handler).serve_forever()
"""
VLLM = """#!/bin/sh
exec {python} -c {code} "$4" "$7" "$9"
"""


class Deployment:
    """A supervisor, an Envoy and small real processes in place of vLLM."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.runs, self.port = folder, folder / "runs", free_port("127.0.0.1")
        self.key: SecretStr | None = None

    def version(self, name: str) -> Version:
        model = self.folder / name
        model.mkdir(exist_ok=True)
        (model / "config.json").write_text('{"nvila": {"num_video_frames": 4}}')
        return Version(name="small", version=name, digest=f"digest-{name}", model_dir=str(model))

    def want(self, **fields: Any) -> Wanted:
        with deployment.exclusive(self.runs):
            address = {"host": "127.0.0.1", "port": self.port}
            wanted = deployment.change(self.runs, **address, key=deployment.fingerprint(self.key), **fields)
            deployment.ensure_supervisor(self.runs, self.key)
        return wanted

    def serve(self, **fields: Any) -> Status:
        """Until it is so."""
        wanted = self.want(**fields)
        roles = [role for role in ("champion", "challenger") if fields.get(role)]

        def ready(status: Status) -> bool:
            found = [status.of(role) for role in roles]
            return all(one is not None and one.state == "ready" for one in found) and len(status.versions) == len(roles)

        return deployment.wait_for(self.runs, wanted.generation, ready, 60)

    @property
    def status(self) -> Status:
        found = deployment.running(self.runs)
        assert found is not None, deployment.tail(self.runs / "serving" / "supervisor.log", 40)
        return found

    def ask(self, body: bytes = b"hi") -> str | int:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        try:
            connection.request("POST", "/v1/x", body)
            answer = connection.getresponse()
            return answer.read().decode() if answer.status == 200 else answer.status
        except OSError:
            return 0
        finally:
            connection.close()

    def back(self, killed: psutil.Process, name: str) -> bool:
        """Whether it answers again, with another process in the place of one that was killed."""
        guards = deployment.read(self.runs, Guards)
        if self.ask() != "a None" or guards is None or self.status.supervisor.pid != guards.guards[0][0]:
            return False
        try:
            now = self.processes()[name]
        except psutil.NoSuchProcess:  # the record is of a moment ago
            return False
        return now != killed and not gone([now])

    def processes(self) -> dict[str, psutil.Process]:
        """Every process of it by what it is."""
        status, guards = self.status, deployment.read(self.runs, Guards)
        champion = status.of("champion")
        assert guards and status.envoy and champion
        api, engine = map(int, Path(champion.version.model_dir, "pids").read_text().split())
        found = {"supervisor": guards.guards[0][0], "standby": guards.guards[1][0], "server": api, "engine": engine}
        found |= {"between": champion.pid, "envoy": status.envoy.session, "between Envoy": status.envoy.pid}
        if not all(found.values()):  # a session is known a moment after its first process has started
            time.sleep(0.1)
            return self.processes()
        return {name: psutil.Process(pid) for name, pid in found.items()}


@pytest.fixture
def served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Deployment]:
    real = interpreter.envoy()
    (tmp_path / "bin").mkdir()
    python = tmp_path / "bin" / "python"
    python.write_text(VLLM.format(python=sys.executable, code=shlex.quote(FAKE)))
    python.chmod(0o755)
    (tmp_path / "bin" / "envoy").symlink_to(real)
    monkeypatch.setenv("NVILA_SERVE_PYTHON", str(python))
    one = Deployment(tmp_path)
    yield one
    with deployment.exclusive(one.runs):
        deployment.end(one.runs)


def wait_for(there: Callable[[], Any], what: str) -> None:
    deadline = time.monotonic() + 60
    while not there():
        assert time.monotonic() < deadline, what
        time.sleep(0.05)


def gone(processes: list[psutil.Process]) -> bool:
    return all(not one.is_running() or one.status() == psutil.STATUS_ZOMBIE for one in processes)


ALONG = {
    "between": ["server", "engine"],
    "server": ["engine", "between"],
    "engine": ["server", "between"],
    "envoy": ["between Envoy"],
    "between Envoy": ["envoy"],
}
"""What ends with a process that is killed."""


def test_whatever_is_killed_comes_back_and_leaves_nothing(served: Deployment) -> None:
    """Nothing restarted a server that had ended, and its engine kept the memory of a model."""
    served.serve(champion=served.version("a"))
    ever: set[psutil.Process] = set()
    for killed in ("supervisor", "standby", "server", "envoy", "engine", "supervisor", "between Envoy", "between"):
        before = served.processes()
        ever |= {*before.values()}
        threading.Thread(target=served.ask, args=(b"stream",), daemon=True).start()
        time.sleep(0.2)
        before[killed].kill()
        ended = {killed, *ALONG.get(killed, [])}
        wait_for(lambda: gone([before[one] for one in ended]), f"{killed}: something is left")  # noqa: B023
        wait_for(lambda: served.back(before[killed], killed), f"{killed}: it does not come back")  # noqa: B023
        after = served.processes()
        untouched = {*before} - ended - ({"standby"} if killed == "supervisor" else set())
        assert {name for name in untouched if before[name] != after[name]} == set(), killed
    assert served.status.restarts == 2
    with deployment.exclusive(served.runs):
        assert deployment.end(served.runs)
    wait_for(lambda: gone([*ever, *after.values()]), "something is left")


def test_where_all_who_look_after_it_are_killed_nothing_runs_on(served: Deployment) -> None:
    """Two gigabytes lived on, with a port that nobody would free."""
    served.serve(champion=served.version("a"))
    running = served.processes()
    running["supervisor"].suspend()
    running["standby"].kill()
    running["supervisor"].kill()
    wait_for(lambda: gone(list(running.values())), "something is left")


def test_what_a_dead_supervisor_has_left_is_ended_by_stop(served: Deployment) -> None:
    """Where the processes between are killed as well, only the record knows the engine."""
    served.serve(champion=served.version("a"))
    running = served.processes()
    for one in ("supervisor", "standby", "between", "between Envoy", "supervisor"):
        running[one].suspend()
    for one in ("standby", "between", "between Envoy", "supervisor"):
        running[one].kill()
    wait_for(lambda: gone([running["server"]]), "the kernel ends it with the process between")
    assert not gone([running["engine"]])
    with deployment.exclusive(served.runs):
        assert "left of a dead supervisor" in deployment.end(served.runs)[0]
    assert gone(list(running.values()))


def test_a_rollout_loses_no_request_and_no_stream(served: Deployment) -> None:
    """A change of versions took the endpoint down for a minute."""
    a, b = served.version("a"), served.version("b")
    served.serve(champion=a)
    lost, done, streams = list[Any](), threading.Event(), list[Any]()

    def client() -> None:
        while not done.is_set():
            if (answer := served.ask()) not in ("a None", "b None"):
                lost.append(answer)

    steady = threading.Thread(target=client, daemon=True)
    steady.start()
    place = Path(served.status.admin).parent
    assert place.stat().st_mode & 0o077 == 0 and admin_of(served.status).counters()
    served.serve(champion=a, challenger=b, weight=50, tried_by=Process.this())
    stream = threading.Thread(target=lambda: streams.append(served.ask(b"stream")), daemon=True)
    stream.start()
    time.sleep(0.3)
    served.serve(champion=b, challenger=None, weight=0, tried_by=None)
    stream.join(60)
    assert served.ask() == "b None"
    done.set()
    steady.join(60)
    assert not lost and streams == ["hello" * 15]


@pytest.mark.parametrize("killed", ["challenger", "champion"])
def test_what_was_on_its_way_to_a_server_that_ended_is_answered_by_the_other(served: Deployment, killed: Role) -> None:
    """The way to the two together went with the dead one: requests that had been sent that way met a 503."""
    a, b = served.version("a"), served.version("b")
    served.serve(champion=a)
    served.serve(champion=a, challenger=b, weight=100, tried_by=Process.this())
    with socket.create_connection(("127.0.0.1", served.port), 30) as client:
        client.sendall(b"POST /v1/x HTTP/1.1\r\nhost: a\r\ncontent-length: 2\r\n\r\nh")
        wait_for(lambda: admin_of(served.status).receiving({}) == 1, "it does not come in")
        one = served.status.of(killed)
        assert one
        psutil.Process(one.pid).kill()
        wait_for(lambda: envoy.server_of(one.url) not in ways(served.status), "routed")
        client.sendall(b"i")
        assert client.recv(65536).startswith(b"HTTP/1.1 200")


def admin_of(status: Status) -> envoy.Admin:
    return envoy.Admin(status.admin)


def ways(status: Status) -> str:
    """The routes that Envoy holds."""
    dump = admin_of(status).get("/config_dump?resource=dynamic_route_configs")
    return json.dumps(dump)


def test_a_challenger_of_a_killed_rollout_is_dropped(served: Deployment) -> None:
    """A version that was being tried stayed, with a share of the users, until somebody noticed."""
    a, b = served.version("a"), served.version("b")
    rollout = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    born = psutil.Process(rollout.pid)
    tried_by = Process.this().model_copy(update={"pid": rollout.pid, "born": deployment.birth(rollout.pid)})
    served.serve(champion=a)
    served.serve(champion=a, challenger=b, weight=100, tried_by=tried_by)
    assert served.ask() == "b None"
    rollout.kill()
    rollout.wait()
    assert gone([born])
    wait_for(lambda: served.status.of("challenger") is None and served.ask() == "a None", "it is still tried")
    wait_for(lambda: len(served.status.versions) == 1, "its server lives on")


def test_a_first_version_of_a_killed_rollout_leaves_nothing(served: Deployment) -> None:
    """`nvila serve` that is interrupted while the model loads leaves no server behind."""
    rollout = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    tried_by = Process.this().model_copy(update={"pid": rollout.pid, "born": deployment.birth(rollout.pid)})
    served.serve(challenger=served.version("a"), tried_by=tried_by)
    assert served.ask() == 503
    supervisor = psutil.Process(served.status.supervisor.pid)
    rollout.kill()
    rollout.wait()
    wait_for(lambda: gone([supervisor]), "it lives on")
    assert deployment.running(served.runs) is None and deployment.read(served.runs, Wanted) is None


def test_a_server_that_does_not_start_is_tried_again_after_longer_and_longer_waits(served: Deployment) -> None:
    """A loop of starts takes the machine from whoever else works on it; its last words must be kept."""
    version = served.version("a")
    Path(version.model_dir, "die").touch()
    served.want(champion=version)
    seen: list[float] = []
    while len(seen) < 3:
        one = served.status.of("champion")
        if one and one.restarts == len(seen) + 1 and one.state == "waiting":
            seen.append(time.monotonic())
            assert "no such weights" in one.ended
        time.sleep(0.02)
    assert seen[1] - seen[0] > 0.9 and seen[2] - seen[1] > 1.9
    assert served.ask() == 503
    Path(version.model_dir, "die").unlink()
    wait_for(lambda: served.ask() == "a None", "it does not come back")


IMPATIENT = "from nvila.components.serve import supervisor; supervisor.HANG_SECONDS = 3; supervisor.main()"


def test_a_server_that_hangs_is_started_again(served: Deployment) -> None:
    """A process that lives and does not answer is no server."""
    with deployment.exclusive(served.runs):
        deployment.change(served.runs, host="127.0.0.1", port=served.port, champion=served.version("a"))
    subprocess.Popen([sys.executable, "-c", IMPATIENT, str(served.runs)], start_new_session=True)
    wait_for(lambda: served.ask() == "a None", "it does not start")
    before = served.processes()
    Path(served.folder, "a", "hang").touch()
    wait_for(lambda: gone([before["server"], before["engine"]]), "it hangs on")
    Path(served.folder, "a", "hang").unlink()
    wait_for(lambda: served.ask() == "a None", "it does not come back")
    one = served.status.of("champion")
    assert one and one.restarts == 1 and "did not answer" in one.ended


def test_a_torn_record_changes_nothing(served: Deployment) -> None:
    """A crash of the machine tears a file; what is served must not end for it."""
    served.serve(champion=served.version("a"))
    before = served.processes()
    for content in (b"", b"{", b"[]", b"\xff"):
        deployment.place(served.runs, Wanted).write_bytes(content)
        time.sleep(0.6)
    assert served.ask() == "a None" and served.processes() == before


def test_a_key_that_is_set_later_is_asked_for(served: Deployment) -> None:
    """An endpoint stood open although its owner had set a key since."""
    served.serve(champion=served.version("a"))
    served.key = SecretStr("sesame")
    served.serve(champion=served.version("a"))
    assert served.ask() == "a sesame"
    written = b"".join(path.read_bytes() for path in served.runs.rglob("*") if path.is_file())
    assert b"sesame" not in written
    assert not any("sesame" in word for one in served.processes().values() for word in one.cmdline())


def test_it_outlives_the_terminal_and_holds_nothing_of_it(served: Deployment) -> None:
    """A closed terminal ended the endpoint, and a pipe behind `nvila serve` never ended."""
    served.serve(champion=served.version("a"))
    supervisor = psutil.Process(served.status.supervisor.pid)
    assert os.getsid(supervisor.pid) != os.getsid(0)
    for descriptor in (0, 1, 2):
        leads = str(Path(f"/proc/{supervisor.pid}/fd/{descriptor}").readlink())
        assert leads == "/dev/null" or leads.endswith("supervisor.log")
    supervisor.send_signal(signal.SIGHUP)
    time.sleep(0.5)
    assert served.ask() == "a None"


def test_a_port_of_another_program_is_told_of(served: Deployment) -> None:
    """Nothing may be served elsewhere instead, and the reason must reach the one who waits."""
    with socket.socket() as other:
        other.bind(("127.0.0.1", served.port))
        other.listen()
        served.want(champion=served.version("a"))
        wait_for(lambda: "already in use" in served.status.trouble, json.dumps(served.status.model_dump(), default=str))
    wait_for(lambda: served.ask() == "a None", "the port is free")


def test_serve_status_and_stop_tell_what_is(served: Deployment, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody could say what was served, whether it answered, or how often it had ended."""
    monkeypatch.setattr(endpoint, "_version", lambda reference, runs, name: served.version(reference))
    assert endpoint.look(served.runs) == {"serving": False, "endpoint": None, "left": [], "last_decision": None}
    address = ("127.0.0.1", served.port, served.runs, None)
    first = endpoint.serve("a", *address, options=["max_body_mib=1"])
    again = endpoint.serve("a", *address)
    assert first and again and again.versions == first.versions, "it runs already, with the settings that it has"
    with pytest.raises(PreflightError, match=r"small version a is being served at .*nvila stop"):
        endpoint.serve("b", *address)
    with pytest.raises(PreflightError, match="being served"):
        endpoint.serve("a", *address, options=["max_body_mib=2"])
    assert served.ask(b"x" * 2**21) == 413
    told = endpoint.look(served.runs)
    (one,) = told["endpoint"]["versions"]
    assert told["serving"] and (one["role"], one["version"], one["weight"], one["restarts"]) == (
        "champion",
        "a",
        100,
        0,
    )
    said = "\n".join(endpoint.lines(told))
    assert f"http://127.0.0.1:{served.port}  answers since" in said and "small version a" in said
    assert endpoint.stop(served.runs) == [f"small version a at http://127.0.0.1:{served.port}"]
    assert not endpoint.look(served.runs)["serving"] and endpoint.stop(served.runs) == []


def test_a_model_that_does_not_start_is_told_of_and_leaves_nothing(
    served: Deployment, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reason must be the server's own last words, and it must not be tried for ever after `nvila serve` gave up."""
    monkeypatch.setattr(endpoint, "_version", lambda reference, runs, name: served.version(reference))
    Path(served.version("a").model_dir, "die").touch()
    with pytest.raises(RolloutError, match="no such weights"):
        endpoint.serve("a", "127.0.0.1", served.port, served.runs, None)
    assert deployment.running(served.runs) is None and deployment.read(served.runs, Wanted) is None


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ("max_body", "written key=value"),
        ("max_bodies=3", "Keys: max_body_mib"),
        ("max_body_mib=0", "greater than or equal to 1"),
        ("max_body_mib=much", "valid integer"),
        ("media_domains=a.example,127.0.0.1", "media come from domains"),
        ("certificate=/chain.pem", "come together"),
    ],
)
def test_a_wrong_option_is_refused(option: str, said: str) -> None:
    """An option that is not taken leaves the endpoint open to what its owner has forbidden."""
    with pytest.raises(ConfigError, match=said):
        endpoint.settings_of([option])


def test_options_are_those_of_the_recipe() -> None:
    """What a recipe may say of an endpoint, a person may."""
    found = endpoint.settings_of(["media_domains=a.example,b.example", "request_seconds=5.5", "origins="])
    assert (found.media_domains, found.request_seconds, found.origins) == (["a.example", "b.example"], 5.5, [])


def test_in_the_foreground_it_ends_with_a_signal(served: Deployment) -> None:
    """A pod's process must be the supervisor itself, and give its last answers within the grace period."""
    code = "import sys; from nvila.components.contracts.environment import Environment, entered\n"
    code += "from nvila.pipelines.commands import endpoint; from nvila.components.serve.deployment import Version\n"
    code += "from pathlib import Path\nendpoint._version = lambda *_: Version.model_validate_json(sys.argv[1])\n"
    code += (
        "with entered(Environment.read()): endpoint.serve('a', '127.0.0.1', int(sys.argv[2]), Path(sys.argv[3]), None,"
    )
    code += " foreground=endpoint.Foreground())"
    words = [sys.executable, "-c", code, served.version("a").model_dump_json(), str(served.port), str(served.runs)]
    pod = subprocess.Popen(words)
    wait_for(lambda: served.ask() == "a None", "it does not start")
    answers = list[Any]()
    stream = threading.Thread(target=lambda: answers.append(served.ask(b"stream")), daemon=True)
    stream.start()
    time.sleep(0.5)
    pod.terminate()
    assert pod.wait(60) == 0
    stream.join(30)
    assert answers == ["hello" * 15] and deployment.running(served.runs) is None
