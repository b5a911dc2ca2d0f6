"""Weights from the hub: which commit, what a fault of the hub ends in, and what the cache answers without it."""

from __future__ import annotations

import hashlib
import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import huggingface_hub.constants as constants
import pytest

from nvila.components.contracts.errors import ConfigError, DataError, Unreachable
from nvila.components.data.fetch import fetch, fetch_version, identity
from nvila.components.data.warm import warm

FIRST, SECOND = "1" * 40, "2" * 40
WEIGHTS = b"weights of a hub"
DIGEST = hashlib.sha256(WEIGHTS).hexdigest()


class Hub(ThreadingHTTPServer):
    """The calls that a download makes: which commit, which files, each file."""

    daemon_threads, block_on_close = True, False

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.commit = FIRST
        self.files = {"config.json": b"{}", "model.safetensors": WEIGHTS, "modeling.py": b"raise SystemExit"}
        self.fault: Any = None
        self.garbled = False
        self.asked: list[str] = []
        self.before: Callable[[str], None] = lambda path: None


class _Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        hub, path = self.server, self.path.partition("?")[0]
        hub.asked.append(path)
        hub.before(path)
        if hub.fault == "silent":
            time.sleep(1)
            self.close_connection = True
        elif isinstance(hub.fault, int):
            self._send(hub.fault, b"{}", {"X-Error-Code": "GatedRepo"} if hub.fault == 403 else {})
        elif "/tree/" in path:
            self._send(200, json.dumps([self._entry(name) for name in hub.files]).encode())
        elif "/revision/" in path or re.fullmatch(r"/api/models/[^/]+/[^/]+", path):
            self._send(200, json.dumps({"id": "owner/name", "sha": hub.commit, "siblings": []}).encode())
        elif "/resolve/" in path:
            body = hub.files[path.rpartition("/")[2]]
            etag = self._entry(path.rpartition("/")[2])["lfs"]["oid"]
            body = body[:-1] + b"!" if hub.garbled and len(body) > 2 else body
            self._send(200, body, {"ETag": f'"{etag}"', "X-Repo-Commit": hub.commit})
        else:
            self._send(404, b"{}")

    def _entry(self, name: str) -> dict[str, Any]:
        body = self.server.files[name]
        digest = hashlib.sha256(body).hexdigest()
        lfs = {"oid": digest, "size": len(body), "pointerSize": 1}
        return {"type": "file", "path": name, "size": len(body), "oid": digest[:40], "lfs": lfs}

    def _send(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(body))} | (headers or {})).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


@pytest.fixture
def hub(tmp_path: Path, quick: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub with one repository."""
    server = Hub()
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    monkeypatch.setenv("NVILA_CACHE", str(tmp_path / "cache"))
    endpoint = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", endpoint + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.2)
    yield server
    server.shutdown()
    server.server_close()


def test_only_data_files_of_a_commit_are_taken(hub: Hub) -> None:
    """Code of a repository must not arrive; what was fetched is known by its commit."""
    folder, version = fetch_version("hf://owner/name@main")
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]
    assert version == {"commit": FIRST} == identity("hf://owner/name@main") == identity("hf://owner/name")


def test_a_branch_that_moves_is_another_identity(hub: Hub) -> None:
    """A key over the name alone skips training after the publisher has replaced the weights."""
    fetch("hf://owner/name@main")
    hub.commit, hub.files["model.safetensors"] = SECOND, b"other weights"
    assert identity("hf://owner/name@main") == {"commit": SECOND}
    assert (fetch("hf://owner/name@main") / "model.safetensors").read_bytes() == b"other weights"


def test_a_full_commit_is_its_own_identity(hub: Hub) -> None:
    """A pinned revision cannot change: nobody has to be asked."""
    assert identity(f"hf://owner/name@{SECOND}") == {"commit": SECOND} and hub.asked == []


@pytest.mark.parametrize("fault", ["silent", 500, 503, 429])
def test_a_hub_that_is_away_is_no_verdict(hub: Hub, fault: Any) -> None:
    """Exit code 2 would bury a step because of somebody's maintenance."""
    hub.fault = fault
    for ask in (identity, fetch):
        with pytest.raises(Unreachable, match=r"hf://owner/name@main: no success in 5 tries"):
            ask("hf://owner/name@main")


def test_no_answer_in_the_middle_has_a_limit_too(hub: Hub) -> None:
    """The client of the hub waits for ever for the list of files."""

    def silent_from_now(path: str) -> None:
        hub.fault = "silent" if "/tree/" in path else None

    hub.before = silent_from_now
    with pytest.raises(Unreachable, match="hf://owner/name@main: no success in 5 tries"):
        fetch("hf://owner/name@main")


@pytest.mark.parametrize("fault", [401, 403, 404])
def test_a_refusal_is_the_users(hub: Hub, fault: int) -> None:
    """A repository that is not there or not open to this token does not come with time."""
    hub.fault = fault
    with pytest.raises(DataError, match=r"hf://owner/name@main: .*cannot be downloaded.*HF_TOKEN"):
        fetch("hf://owner/name@main")
    assert len(hub.asked) < 4


@pytest.mark.parametrize("fault", [503, 404])
def test_without_the_hub_the_cache_says_which_commit(hub: Hub, fault: int, capsys: pytest.CaptureFixture[str]) -> None:
    """What is there must not need the network; but it may be old, so it is told."""
    folder = fetch("hf://owner/name@main")
    hub.fault = fault
    assert fetch_version("hf://owner/name@main") == (folder, {"commit": FIRST})
    assert "hf://owner/name@main: taken from the cache as it is" in capsys.readouterr().err


def test_wrong_bytes_of_the_hub_or_its_cache_are_not_taken(hub: Hub) -> None:
    """The hub's client compares sizes only."""
    hub.garbled = True
    with pytest.raises(Unreachable, match=r"model\.safetensors: other bytes than the digest says"):
        fetch("hf://owner/name@main")
    hub.garbled = False
    path = fetch("hf://owner/name@main") / "model.safetensors"
    assert path.read_bytes() == WEIGHTS
    path.resolve().write_bytes(WEIGHTS[::-1])
    assert (fetch("hf://owner/name@main") / "model.safetensors").read_bytes() == WEIGHTS


def test_a_file_of_the_hub_that_the_list_does_not_want_is_removed(hub: Hub) -> None:
    """Left in the cache it would be found there for ever."""
    warm({"hf://owner/name@main": {"model.safetensors": DIGEST}})
    with pytest.raises(DataError, match="has another digest"):
        warm({"hf://owner/name@main": {"model.safetensors": "0" * 64}})
    warm({"hf://owner/name@main": {"model.safetensors": DIGEST}})


@pytest.mark.parametrize("uri", ["hf://a/b/c", "hf://bad name", "hf://"])
def test_a_name_that_the_hub_cannot_have_is_refused(uri: str) -> None:
    """A typing error in the recipe is not a network problem."""
    for ask in (fetch, identity):
        with pytest.raises(ConfigError):
            ask(uri)
