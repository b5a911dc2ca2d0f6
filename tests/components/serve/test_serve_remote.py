"""Remote media: what is fetched, from where, and what never is."""

from __future__ import annotations

import asyncio
import datetime
import ipaddress
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from nvila.components.serve.remote import Remote, is_public

HOST = "media.example"
FORGED = [
    # two parsers, two hosts
    r"http://127.0.0.1:1\@media.example/",
    r"http://media.example\@127.0.0.1/",
    r"http:\\127.0.0.1\media.example",
    r"http://127.0.0.1\.media.example/",
    "http://127.0.0.1#@media.example/",
    "http://127.0.0.1?@media.example/",
    "http://127.0.0.1/@media.example/",
    "http://media.example@127.0.0.1/",
    "http://media.example:80@127.0.0.1/",
    "http://a:b@media.example/",
    "http://@media.example/",
    "http://media.example%40127.0.0.1/",
    "http://127.0.0.1%2f@media.example/",
    "http://127.0.0.1%00.media.example/",
    "http://media.example%00.evil.example/",
    "http://media.example\0.evil.example/",
    "http://media.example\r\nHost: 127.0.0.1/",
    "http://media.example\t/",
    "http://media.example /",
    " http://media.example/",
    "ht\ntp://media.example/",
    "http://media.example/a b",
    "http://media.example/\r\nX: y",
    "http:///media.example/",
    "http:media.example/",
    "http:/media.example/",
    "//media.example/",
    "media.example/",
    "/x.png",
    "",
    "http://",
    "http://:80/",
    "http://media.example:80:80/",
    "http://media.example:99999/",
    "http://media.example:-80/",
    "http://media.example:8x/",
    "http://[media.example]/",
    # other hosts
    "http://evil.example/",
    "http://media.example.evil.example/",
    "http://evil.media.example/",
    "http://evil-media.example/",
    "http://media.example./",
    "http://media%2eexample/",
    "http://.media.example/",
    "http://media.example,evil.example/",
    "http://ｍedia.example/",
    "http://media。example/",
    "http://medi\u0430.example/",  # a Cyrillic letter
    "http://media.example\u200b/",
    "http://xn--mdia-example/",
    # addresses
    "http://127.0.0.1/",
    "http://127.1/",
    "http://2130706433/",
    "http://017700000001/",
    "http://0x7f000001/",
    "http://0x7f.0.0.1/",
    "http://0/",
    "http://localhost/",
    "http://169.254.169.254/latest/meta-data",
    "http://①②⑦.0.0.1/",
    "http://[::1]/",
    "http://[::]/",
    "http://[::ffff:127.0.0.1]/",
    "http://[::ffff:7f00:1]/",
    "http://[64:ff9b::7f00:1]/",
    "http://[2002:7f00:1::]/",
    "http://[fe80::1%25eth0]/",
    "http://[fd00:ec2::254]/",
    # ports and schemes
    "http://media.example:22/",
    "http://media.example:443/",
    "https://media.example:80/",
    "http://media.example:8080/",
    "ftp://media.example/",
    "gopher://media.example/",
    "file://media.example/etc/passwd",
    "ws://media.example/",
    "jar:http://media.example/!/",
    "unix:///var/run/docker.sock",
    "http://media.example/" + "x" * 9000,
]
INNER = (
    *("0.0.0.0", "10.1.2.3", "100.64.0.1", "100.100.100.200", "127.0.0.1", "127.8.8.8", "169.254.169.254"),
    *("172.16.0.1", "172.31.255.255", "192.0.0.192", "192.0.2.1", "192.88.99.1", "192.168.1.1", "198.18.0.1"),
    *("198.51.100.1", "203.0.113.1", "224.0.0.1", "239.255.255.255", "240.0.0.1", "255.255.255.255"),
    "168.63.129.16",
    *("::", "::1", "::127.0.0.1", "::ffff:127.0.0.1", "::ffff:8.8.8.8", "::ffff:0:127.0.0.1"),
    *("64:ff9b::7f00:1", "64:ff9b::808:808", "64:ff9b:1::a00:1", "100::1", "2001::1", "2001:0:4136:e378::1"),
    *("2001:10::1", "2001:20::1", "2001:db8::1", "2002:7f00:1::1", "2002:808:808::1", "3fff::1", "5f00::1"),
    *("fc00::1", "fd00:ec2::254", "fe80::1", "fe80::1%eth0", "fec0::1", "ff02::1"),
)
OUTER = ("8.8.8.8", "1.1.1.1", "172.32.0.1", "100.128.0.1", "192.0.1.1", "2606:4700::1111", "2a00:1450:4001::1")


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        seen: list[tuple[str, dict[str, str]]] = self.server.seen  # type: ignore[attr-defined]
        seen.append((self.path, {name.lower(): value for name, value in self.headers.items()}))
        route, _, rest = self.path[1:].partition("/")
        if route == "to":
            self._answer(302, {"Location": self.server.places[rest]})  # type: ignore[attr-defined]
        elif route == "round":
            self._answer(307, {"Location": "/round", "Set-Cookie": "a=b; Path=/"})
        elif route == "endless":
            self.send_response(200)
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            try:
                while True:
                    self.wfile.write(b"10000\r\n" + b"x" * 65536 + b"\r\n")
            except OSError:
                self.close_connection = True
        elif route == "slow":
            try:
                self.wfile.write(b"HTTP/1.1 200 OK\r\n")
                for number in range(600):
                    self.wfile.write(f"X-{number}: y\r\n".encode())
                    time.sleep(0.05)
            except OSError:
                self.close_connection = True
        elif route == "packed":
            self._answer(200, {"Content-Encoding": "gzip"}, b"\x1f\x8b")
        elif route == "claims":
            self._answer(200, {"Content-Length": str(2**40)})
        elif route == "missing":
            self._answer(404, {}, b"secret of the server")
        else:
            self._answer(200, {}, b"content")

    def _answer(self, status: int, headers: dict[str, str], body: bytes = b"") -> None:
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(body))} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Quiet."""


@contextmanager
def _serving(tls: ssl.SSLContext | None = None) -> Iterator[ThreadingHTTPServer]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    server.daemon_threads, server.block_on_close = True, False
    server.seen, server.places = [], {}  # type: ignore[attr-defined]
    if tls:
        server.socket = tls.wrap_socket(server.socket, server_side=True)
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


@pytest.fixture(scope="module")
def server() -> Iterator[ThreadingHTTPServer]:
    with _serving() as made:
        yield made


def _remote(server: ThreadingHTTPServer, **changes: object) -> Remote:
    """One that may fetch from this machine, whose names all lead to the server."""
    asked: list[str] = []

    async def resolve(host: str, port: int) -> list[tuple[str, int]]:
        asked.append(host)
        return [("127.0.0.1", server.server_address[1])]

    made = Remote(frozenset({HOST}), 10**6, seconds=20, resolve=resolve, allows=lambda _: True)
    return replace(made, **changes)  # type: ignore[arg-type]


def _fetch(remote: Remote, text: str) -> bytes:
    return asyncio.run(remote.fetch(text))


def _seen(server: ThreadingHTTPServer) -> list[tuple[str, dict[str, str]]]:
    return server.seen  # type: ignore[attr-defined, no-any-return]


def test_listed_host_is_fetched_from_without_anything_of_ours(server: ThreadingHTTPServer) -> None:
    """An allow-list that allows nothing, another host in the request than was judged, cookies or keys that leak, or a
    proxy of the environment in between."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("http_proxy", "http://127.0.0.1:1")
        patch.setenv("HTTP_PROXY", "http://127.0.0.1:1")
        assert _fetch(_remote(server), "HTTP://Media.Example/a%2Fb?c=d&e#f") == b"content"
    path, headers = _seen(server)[-1]
    assert path == "/a%2Fb?c=d&e" and headers["host"] == HOST
    assert not {"authorization", "cookie", "referer"} & {*headers}


def test_forged_addresses_are_refused_and_nothing_is_asked(server: ThreadingHTTPServer) -> None:
    """Server-side request forgery: every form that another parser reads as another host, every spelling of an address,
    and other ports and schemes; neither the server nor a resolver may hear of them."""

    async def resolve(host: str, port: int) -> list[tuple[str, int]]:
        raise AssertionError(f"{host} was looked up")

    remote = _remote(server, resolve=resolve)
    before, fetched = len(_seen(server)), []
    for text in FORGED:
        try:
            fetched.append((text, _fetch(remote, text)))
        except ValueError as error:
            assert str(error)
    assert len(FORGED) >= 60 and not fetched and len(_seen(server)) == before


def test_only_public_addresses_are_public() -> None:
    """`ipaddress.is_global` calls translated and mapped addresses global, through which inner ones are reached."""
    assert [text for text in INNER if is_public(ipaddress.ip_address(text))] == []
    assert [text for text in OUTER if not is_public(ipaddress.ip_address(text))] == []


@pytest.mark.parametrize("addresses", [["127.0.0.1"], ["8.8.8.8", "10.0.0.1"], ["::ffff:127.0.0.1"], []])
def test_name_with_an_inner_address_is_refused(server: ThreadingHTTPServer, addresses: list[str]) -> None:
    """A listed name whose owner points it at an inner machine, also beside a public one."""

    async def resolve(host: str, port: int) -> list[tuple[str, int]]:
        return [(address, server.server_address[1]) for address in addresses]

    before = len(_seen(server))
    with pytest.raises(ValueError, match="not public"):
        _fetch(_remote(server, resolve=resolve, allows=is_public), f"http://{HOST}/")
    assert len(_seen(server)) == before


def test_name_is_resolved_once_for_each_request(server: ThreadingHTTPServer) -> None:
    """DNS rebinding: a second answer, which nobody judged, must not be what is connected to."""
    answers = [[("127.0.0.1", server.server_address[1])], [("127.0.0.1", 1)]]

    async def resolve(host: str, port: int) -> list[tuple[str, int]]:
        return answers.pop(0)

    assert _fetch(_remote(server, resolve=resolve), f"http://{HOST}/") == b"content"
    assert len(answers) == 1


@pytest.mark.parametrize(
    ("target", "reason"),
    [
        ("http://127.0.0.1/", "not one of the hosts"),
        ("//127.0.0.1/", "not one of the hosts"),
        (r"http://127.0.0.1\@media.example/", "backslash"),
        ("file:///etc/passwd", "must read"),
        ("http://media.example:22/", "port"),
        ("https://u:p@media.example/", "user"),
        ("http://medi\u0430.example/", "ASCII"),
    ],
)
def test_redirects_are_judged_again(server: ThreadingHTTPServer, target: str, reason: str) -> None:
    """A listed host that sends on to an inner one."""
    server.places["x"] = target.encode().decode("latin-1")  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match=reason):
        _fetch(_remote(server), f"http://{HOST}/to/x")


def test_redirects_are_followed_three_times(server: ThreadingHTTPServer) -> None:
    """Pictures that moved, without a circle that never ends; and no cookie is kept between the steps."""
    server.places |= {"1": "/to/2", "2": "../to/3", "3": "/picture"}  # type: ignore[attr-defined]
    assert _fetch(_remote(server), f"http://{HOST}/to/1") == b"content"
    before = len(_seen(server))
    with pytest.raises(ValueError, match="more than 3 times"):
        _fetch(_remote(server), f"http://{HOST}/round")
    rounds = _seen(server)[before:]
    assert len(rounds) == 4 and not any("cookie" in headers for _, headers in rounds)


@pytest.mark.parametrize(
    ("route", "reason"),
    [
        ("endless", "more than 1000000 bytes"),
        ("claims", "more than 1000000 bytes"),
        ("packed", "compressed"),
        ("missing", "answered 404"),
        ("slow", "within 1 seconds"),
    ],
)
def test_bad_servers_are_the_askers_error(server: ThreadingHTTPServer, route: str, reason: str) -> None:
    """A server that sends for ever or a byte at a time must hold no request, and its words must not come back."""
    with pytest.raises(ValueError, match=reason) as error:
        _fetch(_remote(server, seconds=1.0 if route == "slow" else 20.0), f"http://{HOST}/{route}")
    assert "secret" not in str(error.value)


def test_bytes_are_counted_as_they_come(server: ThreadingHTTPServer) -> None:
    """All media of a request together have so many bytes: they must not be in memory before they are counted."""
    taken: list[int] = []

    def take(count: int) -> None:
        taken.append(count)
        if sum(taken) > 100_000:
            raise ValueError("no more")

    with pytest.raises(ValueError, match="no more"):
        asyncio.run(_remote(server).fetch(f"http://{HOST}/endless", take))
    assert 100_000 < sum(taken) < 10**6


def test_nobody_listens(server: ThreadingHTTPServer) -> None:
    """A refused connection is no fault of ours: 400 and not 500."""

    async def resolve(host: str, port: int) -> list[tuple[str, int]]:
        return [("127.0.0.1", 1)]

    with pytest.raises(ValueError, match="cannot be fetched from"):
        _fetch(_remote(server, resolve=resolve), f"http://{HOST}/")


def test_nothing_is_fetched_without_a_list(server: ThreadingHTTPServer) -> None:
    """What the operator did not allow."""
    with pytest.raises(ValueError, match="switched off"):
        _fetch(_remote(server, domains=frozenset()), f"http://{HOST}/")


def test_certificate_is_of_the_name(tmp_path: Path) -> None:
    """A connection to a judged address must still prove the name: else who holds the address is believed."""
    make = _certificates(tmp_path)
    for name, accepted in ((HOST, True), ("other.example", False)):
        served, trusted = make(name)
        with _serving(served) as server:
            remote = _remote(server, tls=trusted)
            if accepted:
                assert _fetch(remote, f"https://{HOST}/") == b"content"
            else:
                with pytest.raises(ValueError, match="Certificate"):
                    _fetch(remote, f"https://{HOST}/")
            with pytest.raises(ValueError, match="Certificate"):
                _fetch(replace(remote, tls=None), f"https://{HOST}/")


def _certificates(folder: Path) -> Callable[[str], tuple[ssl.SSLContext, ssl.SSLContext]]:
    """Makes a context that proves a name, and one that believes it."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import NameOID

    def make(name: str) -> tuple[ssl.SSLContext, ssl.SSLContext]:
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        now = datetime.datetime.now(datetime.UTC)
        certificate = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(subject)
            .public_key(key.public_key())
            .serial_number(1)
            .not_valid_before(now - datetime.timedelta(days=1))
            .not_valid_after(now + datetime.timedelta(days=1))
            .add_extension(x509.SubjectAlternativeName([x509.DNSName(name)]), critical=False)
            .sign(key, hashes.SHA256())
        )
        file = folder / f"{name}.pem"
        private = key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        file.write_bytes(private + certificate.public_bytes(serialization.Encoding.PEM))
        served = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        served.load_cert_chain(file)
        return served, ssl.create_default_context(cafile=str(file))

    return make
