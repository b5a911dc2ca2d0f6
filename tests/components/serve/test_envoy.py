from __future__ import annotations

import http.client
import json
import signal
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from nvila.components.contracts.modelrollout import PIN_HEADER
from nvila.components.contracts.recipe.endpoint import EndpointSettings
from nvila.components.contracts.surroundings import own_folder
from nvila.components.serve import envoy, interpreter
from nvila.components.serve.ports import free_port
from nvila.components.serve.routes import LAST_HEADER, Ways

SETTINGS = EndpointSettings(max_body_mib=2, max_connections=20)
NEW, OLD = "new", "old"


class Handler(BaseHTTPRequestHandler):
    """Answers with its server's name and the size of what it got; or as its server's `mode` says."""

    protocol_version = "HTTP/1.1"
    server: Upstream

    def log_message(self, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._answer(json.dumps({key.lower(): value for key, value in self.headers.items()}).encode())

    def do_POST(self) -> None:
        received = len(self.rfile.read(int(self.headers["content-length"])))
        mode = self.server.mode
        if mode == "reset":
            self.connection.shutdown(socket.SHUT_RDWR)
        elif mode == "500":
            self._answer(b"fault", 500)
        elif mode in ("slow", "half"):
            self.send_response(200)
            self.send_header("transfer-encoding", "chunked")
            self.end_headers()
            for _ in range(1 if mode == "half" else 10):
                self.wfile.write(b"5\r\nhello\r\n")
                self.wfile.flush()
                time.sleep(0.1)
            self.wfile.write(b"0\r\n\r\n" if mode == "slow" else b"")
            self.connection.shutdown(socket.SHUT_RDWR)
        else:
            self._answer(f"{self.server.name} {received}".encode())

    def _answer(self, body: bytes, status: int = 200) -> None:
        self.send_response(status)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


class Upstream(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, name: str) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.name, self.mode, self.connections = name, "ok", list[socket.socket]()
        self.address = f"127.0.0.1:{self.server_port}"
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()

    def process_request(self, request: Any, client_address: Any) -> None:
        self.connections.append(request)
        super().process_request(request, client_address)

    def handle_error(self, *_: Any) -> None:
        pass

    def end(self) -> None:
        for connection in self.connections:
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        self.shutdown()
        self.server_close()


class Front:
    """A real Envoy before two small servers."""

    def __init__(self, folder: Path, address: str, settings: EndpointSettings, idle_seconds: int) -> None:
        self.folder, self.address, self.settings, self.idle_seconds = folder, address, settings, idle_seconds
        self.port = free_port(address)
        self.new, self.old = Upstream(NEW), Upstream(OLD)
        self.admin = envoy.Admin(str(folder / "admin"))

    def route(self, **options: Any) -> None:
        """As `envoy.files` takes it; returns when it holds."""
        servers, ways = [self.new.address, self.old.address], Ways(**options)
        made = envoy.files(self.folder, self.address, self.port, self.settings, servers, ways, self.idle_seconds)
        envoy.link_certificate(self.folder, self.settings)
        admin = self.admin if (self.folder / "admin").exists() else None
        assert envoy.apply(self.folder, made, admin, 5), (self.folder / "log").read_text()

    def tried(self, weight: int = 100) -> None:
        self.route(champion=self.old.address, challenger=self.new.address, weight=weight)

    def connect(self, timeout: float = 20) -> http.client.HTTPConnection:
        return http.client.HTTPConnection(self.address, self.port, timeout=timeout)

    def ask(
        self, body: bytes | None = b"hi", path: str = "/v1/x", headers: dict[str, str] | None = None
    ) -> tuple[int, bytes, dict[str, str]]:
        connection = self.connect()
        connection.request("GET" if body is None else "POST", path, body, headers or {})
        answer = connection.getresponse()
        try:
            return answer.status, answer.read(), {key.lower(): value for key, value in answer.getheaders()}
        finally:
            connection.close()

    def raw(self, sent: bytes, seconds: float = 20) -> bytes:
        """All that comes back until the connection is closed."""
        with socket.create_connection((self.address, self.port), seconds) as client:
            client.sendall(sent)
            got = b""
            try:
                while more := client.recv(65536):
                    got += more
            except ConnectionResetError:
                pass
        return got


@contextmanager
def front(
    folder: Path, address: str = "127.0.0.1", settings: EndpointSettings = SETTINGS, idle_seconds: int | None = None
) -> Iterator[Front]:
    one = Front(folder, address, settings, envoy.IDLE_SECONDS if idle_seconds is None else idle_seconds)
    one.route(champion=one.old.address)
    command = envoy.arguments(interpreter.envoy(), folder)
    checked = subprocess.run([*command, "--mode", "validate"], capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stderr
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        wait_for(lambda: process.poll() is not None or accepts(address, one.port), (folder / "log").read_text)
        assert process.poll() is None, (folder / "log").read_text()
        yield one
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
        one.new.end()
        one.old.end()


@pytest.fixture(scope="module")
def endpoint() -> Iterator[Front]:
    folder = own_folder("test-envoy") / str(time.monotonic_ns())
    folder.mkdir()
    with front(folder) as one:
        yield one


@pytest.fixture(autouse=True)
def as_before(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    if "endpoint" in request.fixturenames:
        one = request.getfixturevalue("endpoint")
        one.new.mode = one.old.mode = "ok"
        one.route(champion=one.old.address)


def wait_for(there: Callable[[], bool], what: str | Callable[[], str]) -> None:
    deadline = time.monotonic() + 60
    while not there():
        assert time.monotonic() < deadline, what if isinstance(what, str) else what()
        time.sleep(0.02)


def accepts(address: str, port: int) -> bool:
    try:
        socket.create_connection((address, port), 5).close()
    except OSError:
        return False
    return True


def test_a_steady_client_loses_nothing_while_weights_move(endpoint: Front) -> None:
    """A rollout cost the endpoint's users half of their requests."""
    failed, answers, done = list[str](), list[str](), threading.Event()

    def client() -> None:
        connection = endpoint.connect()
        while not done.is_set():
            connection.request("POST", "/v1/x", b"hi")
            answer = connection.getresponse()
            body = answer.read()
            (answers if answer.status == 200 else failed).append(body.decode())

    threads = [threading.Thread(target=client, daemon=True) for _ in range(4)]
    for thread in threads:
        thread.start()
    for weight in (0, 10, 50, 100):
        endpoint.tried(weight)
        time.sleep(0.2)
    endpoint.route(champion=endpoint.new.address)
    time.sleep(0.2)
    done.set()
    for thread in threads:
        thread.join(30)
    assert not failed and {"new 2", "old 2"} == set(answers)
    assert endpoint.ask()[1] == b"new 2"


@pytest.mark.parametrize("mode", ["reset", "500", "gone"])
def test_what_a_newcomer_fails_to_answer_the_champion_answers(endpoint: Front, mode: str) -> None:
    """Users paid for the trial of a version with errors; the body, of any size that is allowed, is sent once more."""
    endpoint.tried()
    before = endpoint.admin.counters()[endpoint.new.address]
    if mode == "gone":
        endpoint.new.end()
    endpoint.new.mode = mode
    body = b"x" * (2 * 2**20 - 100)
    try:
        assert endpoint.ask(body)[:2] == (200, f"old {len(body)}".encode())
        counted = endpoint.admin.counters()[endpoint.new.address]
        assert counted.errors == before.errors + 1 and counted.active == 0
        assert counted.refused - before.refused == (mode == "gone")
    finally:
        if mode == "gone":
            endpoint.new = Upstream(NEW)


def test_a_champion_that_fails_is_not_asked_twice(endpoint: Front) -> None:
    """A request that ends a server must not end it twice."""
    endpoint.old.mode = "reset"
    before = endpoint.admin.counters()[endpoint.old.address].requests
    status, body, headers = endpoint.ask()
    assert status == 503 and "retry-after" in headers
    assert json.loads(body)["error"]["code"] == 503
    assert endpoint.admin.counters()[endpoint.old.address].requests == before + 1


def pinned(front: Front, version: str, body: bytes | None = b"hi", path: str = "/v1/x") -> tuple[int, bytes]:
    return front.ask(body, path, {PIN_HEADER: version})[:2]


def test_a_version_that_is_named_answers_and_no_other(endpoint: Front) -> None:
    """A client that compares two versions got either, or the champion's answer for that of a challenger that failed."""
    versions = {"1": endpoint.old.address, "2": endpoint.new.address, "3": None}
    both = {"champion": endpoint.old.address, "challenger": endpoint.new.address}
    endpoint.route(**both, weight=50, versions=versions)
    assert {pinned(endpoint, "1")[1] for _ in range(8)} == {b"old 2"}
    assert {pinned(endpoint, "2")[1] for _ in range(8)} == {b"new 2"}
    assert pinned(endpoint, "1", None, "/health")[0] == 200
    endpoint.new.mode = "500"
    before = endpoint.admin.counters()[endpoint.new.address].requests
    assert pinned(endpoint, "2") == (500, b"fault")
    assert endpoint.admin.counters()[endpoint.new.address].requests == before + 1
    assert pinned(endpoint, "3")[0] == 503
    for other in ("4", "", "1,2", "01", "1.0"):
        status, body = pinned(endpoint, other)
        assert (status, json.loads(body)["error"]["code"]) == (404, "version_not_served"), other


@pytest.mark.parametrize("mode", ["reset", "500", "gone"])
def test_what_the_only_server_of_a_pod_fails_to_answer_another_endpoint_answers(endpoint: Front, mode: str) -> None:
    """A newcomer's faults were its users' wherever the Gateway tries nothing twice; a request that fails everywhere
    went round between two endpoints for ever."""
    elsewhere, alone = {"champion": endpoint.new.address, "fallback": endpoint.old.address}, {LAST_HEADER: "1"}
    endpoint.route(**elsewhere, versions={"2": endpoint.new.address})
    assert endpoint.ask()[:2] == (200, b"new 2")
    if mode == "gone":
        endpoint.new.end()
    endpoint.new.mode = mode
    failed = {"reset": 503, "500": 500, "gone": 503}[mode]
    try:
        assert endpoint.ask()[:2] == (200, b"old 2")
        assert pinned(endpoint, "2")[0] == failed
        assert endpoint.ask(headers=alone)[0] == failed
        endpoint.old.mode = mode if mode != "gone" else "500"
        assert endpoint.ask()[0] in (500, 503)
    finally:
        if mode == "gone":
            endpoint.new = Upstream(NEW)


def test_probes_are_no_requests(endpoint: Front) -> None:
    """A rollout that waits for so many requests of users went on for those of a load balancer."""
    before = endpoint.admin.counters()[endpoint.old.address]
    assert endpoint.ask(None, "/health")[0] == 200
    assert endpoint.admin.counters()[endpoint.old.address] == before


def test_another_endpoint_knows_a_last_try(endpoint: Front) -> None:
    """Two endpoints that are each other's would send a request round."""
    endpoint.route(champion=endpoint.new.address, fallback=endpoint.old.address)
    assert LAST_HEADER in json.loads(endpoint.ask(None, "/seen")[1])
    endpoint.route(fallback=endpoint.old.address)
    assert LAST_HEADER in json.loads(endpoint.ask(None, "/seen")[1])
    assert endpoint.ask(None, "/health")[0] == 503, "a pod without a server is not ready"
    assert endpoint.ask(headers={LAST_HEADER: "1"})[0] == 503


@pytest.mark.parametrize("nowhere", ["nobody.invalid:8321", "127.0.0.1:1", "[::1]:1"])
def test_another_endpoint_that_is_not_there_takes_nothing_away(endpoint: Front, nowhere: str) -> None:
    """While no champion is served, its Service has no address, and the first version could not start."""
    endpoint.route(champion=endpoint.new.address, fallback=nowhere)
    assert {endpoint.ask()[:2] for _ in range(8)} == {(200, b"new 2")}
    endpoint.new.mode = "500"
    assert endpoint.ask()[0] in (500, 503)


@pytest.mark.parametrize("weight", [0, 100])
def test_a_stream_that_breaks_does_not_end_like_a_whole_one(endpoint: Front, weight: int) -> None:
    """A client took the half of an answer for all of it."""
    endpoint.new.mode = endpoint.old.mode = "half"
    endpoint.tried(weight)
    asked = endpoint.new if weight else endpoint.old
    before = endpoint.admin.counters()[asked.address].broken
    got = endpoint.raw(b"POST /v1/x HTTP/1.1\r\nhost: a\r\ncontent-length: 2\r\n\r\nhi")
    assert got.count(b"hello") == 1 and not got.endswith(b"0\r\n\r\n")
    assert endpoint.admin.counters()[asked.address].broken == before + 1


def test_a_stream_comes_as_it_is_written(endpoint: Front) -> None:
    """Held back until its end, a stream is none."""
    endpoint.old.mode = "slow"
    connection = endpoint.connect()
    connection.request("POST", "/v1/x", b"hi")
    answer = connection.getresponse()
    assert answer.read(5) == b"hello"
    assert endpoint.admin.counters()[endpoint.old.address].active == 1
    assert answer.read() == b"hello" * 9


def test_what_goes_on_with_a_removed_server_is_answered(endpoint: Front) -> None:
    """A server that is drained still has requests in hand; they outlast the change of the routes."""
    endpoint.new.mode = "slow"
    endpoint.tried()
    connection = endpoint.connect()
    connection.request("POST", "/v1/x", b"hi")
    answer = connection.getresponse()
    endpoint.route(champion=endpoint.old.address)
    assert answer.read() == b"hello" * 10


START = b"POST /v1/x HTTP/1.1\r\nhost: a\r\n"
REFUSED = {
    "length and chunks": (400, START + b"content-length: 3\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n"),
    "two lengths": (400, START + b"content-length: 3\r\ncontent-length: 4\r\n\r\nabcd"),
    "space before the colon": (400, START + b"transfer-encoding : chunked\r\n\r\n0\r\n\r\n"),
    "an unknown coding": (501, START + b"transfer-encoding: xchunked\r\n\r\n0\r\n\r\n"),
    "a signed length": (400, START + b"content-length: +3\r\n\r\nabc"),
    "a chunk's size that is none": (400, START + b"transfer-encoding: chunked\r\n\r\n0x2\r\nab\r\n0\r\n\r\n"),
    "an underscore": (400, START + b"content_length: 3\r\ncontent-length: 0\r\n\r\n"),
    "a hidden slash": (400, b"GET /v1%2fmodels HTTP/1.1\r\nhost: a\r\n\r\n"),
    "no host": (400, b"GET /v1/models HTTP/1.1\r\n\r\n"),
    "HTTP/1.0": (426, b"GET / HTTP/1.0\r\n\r\n"),
    "no HTTP": (400, b"\x16\x03\x01\x02\x00 hello\r\n\r\n"),
    "another protocol": (403, b"GET / HTTP/1.1\r\nhost: a\r\nupgrade: websocket\r\nconnection: upgrade\r\n\r\n"),
    "a large body": (413, START + b"content-length: 9000000\r\n\r\n" + b"x" * 2**22),
    "many headers": (431, b"GET / HTTP/1.1\r\nhost: a\r\n" + b"".join(b"h%d: 1\r\n" % i for i in range(120)) + b"\r\n"),
    "a large header": (431, b"GET / HTTP/1.1\r\nhost: a\r\nx: " + b"y" * 70_000 + b"\r\n\r\n"),
}


def test_what_two_programs_could_read_differently_is_refused(endpoint: Front) -> None:
    """A request in another one's body passed every rule; a client was told so as no library of OpenAI's expects it."""
    with ThreadPoolExecutor(len(REFUSED)) as pool:
        answers = dict(zip(REFUSED, pool.map(lambda form: endpoint.raw(form[1]), REFUSED.values()), strict=True))
    for form, got in answers.items():
        head, _, body = got.partition(b"\r\n\r\n")
        assert head.startswith(f"HTTP/1.1 {REFUSED[form][0]} ".encode()) and got.count(b"date: ") == 1, (form, got)
        assert set(json.loads(body)["error"]) == {"message", "type", "param", "code"}, form
        assert b"envoy" not in got.lower(), form


def test_a_client_cannot_say_who_it_is(endpoint: Front) -> None:
    """An address that the client chose stood in logs and limits, and its headers steered Envoy."""
    forged = ("x-forwarded-for", "x-real-ip", "x-request-id", "x-envoy-retry-on", "x-envoy-upstream-rq-timeout-ms")
    seen = json.loads(endpoint.ask(None, "/seen", dict.fromkeys(forged, "1"))[1])
    assert not {name for name, value in seen.items() if value == "1" or name.startswith("x-envoy")}
    assert "x-request-id" in seen and "server" not in endpoint.ask(None)[2]


def test_without_a_champion_users_are_told_to_come_again(endpoint: Front) -> None:
    """While no server is ready a client that is told so tries again; one that is hung up on does not."""
    endpoint.route()
    status, body, headers = endpoint.ask()
    assert status == 503 and headers["retry-after"] == "5"
    assert json.loads(body)["error"]["type"] == "server_error"


def test_connections_that_say_nothing_are_closed(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: Any) -> None:
    """600 half-open connections stayed for ever, and nobody else got one."""
    monkeypatch.setattr(envoy, "HEADER_SECONDS", 1)
    monkeypatch.setattr(envoy, "BODY_SECONDS", 1)
    monkeypatch.setattr(envoy, "IDLE_SECONDS", 2)
    folder = own_folder("test-envoy") / str(time.monotonic_ns())
    folder.mkdir()
    with front(folder, settings=SETTINGS.model_copy(update={"max_connections": 5})) as one:
        assert one.raw(b"") == b""
        assert b" 408 " in one.raw(b"GET / HTTP/1.1\r\nhost")
        assert b" 408 " in one.raw(START + b"content-length: 5\r\n\r\nhi")
        held = [socket.create_connection((one.address, one.port), 20) for _ in range(5)]
        assert one.raw(b"GET / HTTP/1.1\r\nhost: a\r\n\r\n") == b""
        for connection in held:
            assert connection.recv(1) == b""
            connection.close()
        assert one.ask()[0] == 200  # which had no room before


def certificate(folder: Path, name: str) -> None:
    """`chain.pem` and `key.pem` in place, of a host of this name."""
    made = ["-subj", f"/CN={name}", "-addext", f"subjectAltName=DNS:{name}", "-days", "2", "-nodes"]
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", *made]
    command += ["-keyout", str(folder / "key.pem"), "-out", str(folder / "chain.pem")]
    subprocess.run(command, check=True, capture_output=True)


def test_a_renewed_certificate_is_used_without_a_restart(tmp_path: Path) -> None:
    """An endpoint whose certificate had run out was down until somebody restarted it. IPv6 on the way."""
    certificate(tmp_path, "first.example")
    settings = EndpointSettings(certificate=str(tmp_path / "chain.pem"), certificate_key=str(tmp_path / "key.pem"))
    folder = own_folder("test-envoy") / str(time.monotonic_ns())
    folder.mkdir()

    def name() -> str:
        context = ssl.create_default_context(cafile=str(tmp_path / "chain.pem"))
        context.check_hostname = False
        try:
            with socket.create_connection(("::1", one.port), 20) as plain, context.wrap_socket(plain) as client:
                client.sendall(b"POST /v1/x HTTP/1.1\r\nhost: a\r\ncontent-length: 2\r\n\r\nhi")
                assert client.recv(4096).startswith(b"HTTP/1.1 200")
                shown: Any = client.getpeercert()
                return str(shown["subject"][0][0][1])
        except ssl.SSLCertVerificationError:
            return ""

    with front(folder, "::1", settings) as one:
        assert name() == "first.example"
        assert one.raw(b"GET / HTTP/1.1\r\nhost: a\r\n\r\n") == b""
        certificate(tmp_path, "second.example")
        one.route(champion=one.old.address)
        wait_for(lambda: name() == "second.example", "the old certificate is still shown")
