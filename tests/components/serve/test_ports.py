"""Addresses where nothing can listen are answered before anything long starts."""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from nvila.components.contracts.errors import ConfigError, DataError, PreflightError
from nvila.components.preflight.step import port_problems
from nvila.components.serve import server
from nvila.components.serve.batch import served_config
from nvila.components.serve.ports import free_port, why_not
from nvila.pipelines.commands.endpoint import serve


@pytest.fixture
def taken() -> Iterator[int]:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        sock.listen()
        yield sock.getsockname()[1]


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "0.0.0.0", "::1", "::"])
def test_addresses_of_this_machine_can_be_had(host: str) -> None:
    """IPv6 was bound as IPv4, whose error named no reason."""
    assert why_not(host, free_port(host)) is None


@pytest.mark.parametrize(
    ("host", "port", "reason"),
    [
        ("no-such-host.invalid", 8497, "unknown host"),
        ("a..b", 8497, "unknown host"),
        ("a\0b", 8497, "unknown host"),
        ("192.0.2.1", 8497, "not an address of this machine"),
        ("2001:db8::1", 8497, "not an address of this machine"),
        ("127.0.0.1", 0, "ports go from 1 to 65535"),
        ("127.0.0.1", 70000, "ports go from 1 to 65535"),
        ("::1", -1, "ports go from 1 to 65535"),
        ("", 8497, "a host name"),
        ("[::1]", 8497, "without brackets"),
        ("fe80::1%lo", 8497, "without brackets and zone"),
    ],
)
def test_an_address_that_cannot_be_had_is_refused_at_once(host: str, port: int, reason: str, tmp_path: Path) -> None:
    """After hours of training, or a download, a traceback of the socket is the wrong answer."""
    (problem,) = port_problems(host, port, tmp_path)
    assert reason in problem and "rollout.host" in problem
    with pytest.raises(PreflightError, match=reason):
        serve("champion", host, port, tmp_path / "runs", None)
    assert not (tmp_path / "runs").exists(), "nobody was asked for the model"


def test_a_port_in_use_is_refused_before_the_model_is_looked_for(taken: int, tmp_path: Path) -> None:
    """A model may be a download of an hour."""
    with pytest.raises(PreflightError, match="already in use"):
        serve("champion", "127.0.0.1", taken, tmp_path, None)


def test_a_privileged_port_is_named_as_such() -> None:
    """`Permission denied` beside an address says nothing about ports."""
    if (child := os.fork()) == 0:
        os.setuid(12345)
        limit = int(Path("/proc/sys/net/ipv4/ip_unprivileged_port_start").read_text())
        os._exit(0 if limit < 2 or "only root" in (why_not("127.0.0.1", 1) or "") else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_a_server_at_an_ipv6_address_is_asked_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The printed URL is what people copy."""
    script = tmp_path / "python"
    script.write_text("#!/bin/sh\nexit 0\n")
    script.chmod(0o755)
    monkeypatch.setenv("NVILA_SERVE_PYTHON", str(script))
    (tmp_path / "config.json").write_text('{"nvila": {"num_video_frames": 4}}')
    port = free_port("::1")
    started = server.start(tmp_path, host="::1", port=port, served_name="m", log_path=tmp_path / "log")
    assert started.url == f"http://[::1]:{port}"
    while server.is_alive(started.pid):
        pass


@pytest.mark.parametrize("name", ["a?b.png", "a#b.png", "data:x.png", "a%20b.png", "täst;,.png", "-r.png"])
def test_a_pictures_name_does_not_change_its_kind(name: str, tmp_path: Path) -> None:
    """The name was read as a URL: what lies behind a `?` or `data:` hid the ending."""
    (tmp_path / name).write_bytes(b"x")
    body = server.chat_request("m", "what?", image=tmp_path / name)
    assert body["messages"][0]["content"][0]["image_url"]["url"].startswith("data:image/png;base64,")


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"nvila": 3}', '{"nvila": {}}', '{"nvila": {"fps": NaN}}', None])
def test_a_damaged_configuration_is_named_before_vllm_starts(
    content: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`nvila serve` and vLLM's batches ended in a traceback, and over a pipe they waited for ever."""
    monkeypatch.setenv("NVILA_SERVE_PYTHON", "/bin/true")
    place = tmp_path / "config.json"
    os.mkfifo(place) if content is None else place.write_text(content)
    with pytest.raises(DataError, match=re.escape(str(place))):
        server.start(tmp_path, port=free_port("127.0.0.1"), served_name="m", log_path=tmp_path / "log")
    with pytest.raises((ConfigError, DataError), match=re.escape(str(place))):
        served_config(tmp_path)


def test_a_proxy_is_not_asked_for_the_endpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rollout waited its whole deadline for a server that was up."""
    with socket.create_server(("127.0.0.1", 0)) as proxy:
        proxy.settimeout(0.2)
        monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{proxy.getsockname()[1]}")
        monkeypatch.setenv("no_proxy", "")
        assert not server.is_ready(f"http://127.0.0.1:{free_port('127.0.0.1')}")
        with pytest.raises(TimeoutError):
            proxy.accept()
