"""The init container of a serving pod: from MLflow over HTTP that breaks, S3 or a folder, into a node's cache."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import sys
import threading
from collections import defaultdict
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import pytest
from buckets import Bucket

from nvila.components.contracts.environment import for_child
from nvila.components.contracts.exits import Exit
from nvila.components.contracts.manifest import Manifest, describe_files
from nvila.components.data.remote import insist
from nvila.components.serve import weights

ARTIFACTS = "/api/2.0/mlflow-artifacts/artifacts/"
WEIGHTS = bytes(range(256)) * 4096 * 4
"""4 MiB: several blocks."""


class Mlflow(ThreadingHTTPServer):
    """As much of it as is asked, and what goes wrong."""

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder, self.source = folder, "mlflow-artifacts:/1/models/m-1/artifacts"
        self.faults, self.asked = defaultdict[str, list[Any]](list), list[str]()
        self.ranges, self.authorization = True, ""
        self.url = f"http://127.0.0.1:{self.server_port}"
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()

    def handle_error(self, *_: Any) -> None:
        pass


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Mlflow

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        parts, server = urlsplit(self.path), self.server
        if server.authorization and self.headers["authorization"] != server.authorization:
            return self.say(401, b"who are you?")
        if parts.path == "/api/2.0/mlflow/model-versions/get-download-uri":
            asked = parse_qs(parts.query)
            if (asked["name"], asked["version"]) != (["small"], ["3"]):
                return self.say(404, b'{"error_code": "RESOURCE_DOES_NOT_EXIST", "message": "no version"}')
            return self.say(200, json.dumps({"artifact_uri": server.source}).encode())
        name = unquote(parts.path.removeprefix(ARTIFACTS + "1/models/m-1/artifacts/"))
        wanted = self.headers.get("range", "bytes=0-") if server.ranges else "bytes=0-"
        start = int(wanted.removeprefix("bytes=").rstrip("-"))
        server.asked.append(f"{name} {start}" if start else name)
        fault = server.faults[name].pop(0) if server.faults[name] else None
        path = server.folder / name
        if isinstance(fault, int):
            return self.say(fault, b"{}")
        if not path.is_file():
            return self.say(404, b"{}")
        body = path.read_bytes()[start:]
        if fault == "other bytes":
            body = bytes(len(body))
        self.send_response(206 if start else 200)
        self.send_header("content-length", str(len(body)))
        if start:
            self.send_header("content-range", f"bytes {start}-{start + len(body) - 1}/{start + len(body)}")
        self.end_headers()
        self.wfile.write(body[: len(body) // 2] if fault == "cut" else body)
        self.close_connection = fault == "cut"

    def say(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


class Node:
    """A version that is registered, and a cache to bring it to."""

    def __init__(self, folder: Path) -> None:
        self.registered, self.cache = folder / "registered", folder / "cache"
        (self.registered / "model" / "a b").mkdir(parents=True)
        (self.registered / "model" / "model.safetensors").write_bytes(WEIGHTS)
        (self.registered / "model" / "a b" / "config.json").write_text("{}")
        (self.registered / "told.json").write_text("{}")  # of the step, and not of the model
        files = describe_files(self.registered)
        self.manifest = Manifest(step="quantize", key="0" * 20, kind="model", files=files)
        self.manifest.save(self.registered / "manifest.json")
        (self.registered / "told.json").unlink()
        self.mlflow = Mlflow(self.registered)

    @property
    def words(self) -> list[str]:
        return ["--model", "small", "--version", "3", "--digest", self.manifest.digest, "--into", str(self.cache)]

    @property
    def folder(self) -> Path:
        return self.cache / self.manifest.digest

    def whole(self) -> bool:
        made = Manifest.load(self.folder / "manifest.json")
        left = [path.name for path in self.cache.iterdir() if path.name.endswith(".partial")]
        hidden = [path.name for path in self.folder.iterdir() if path.name.startswith(".")]
        return made.digest == self.manifest.digest and bool(made.dir("model", fresh=True)) and not left + hidden


@pytest.fixture
def node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Node]:
    one = Node(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", one.mlflow.url)
    for name in (
        "MLFLOW_REGISTRY_URI",
        "MLFLOW_TRACKING_USERNAME",
        "MLFLOW_TRACKING_PASSWORD",
        "MLFLOW_TRACKING_TOKEN",
    ):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(insist, "PAUSE_SECONDS", 0.01)
    yield one
    one.mlflow.shutdown()
    one.mlflow.server_close()


def test_a_version_comes_whole_and_once(node: Node) -> None:
    """A pod that is started again fetched its gigabytes again; a file of the folder of the same name was believed."""
    assert weights.main(node.words) == Exit.DONE and node.whole()
    assert sorted(node.mlflow.asked) == ["manifest.json", "model/a b/config.json", "model/model.safetensors"]
    node.mlflow.asked.clear()
    assert weights.main(node.words) == Exit.DONE and node.mlflow.asked == []
    file = node.folder / "model" / "model.safetensors"
    facts = file.stat()
    with file.open("r+b") as stream:
        stream.write(b"#")
    os.utime(file, ns=(facts.st_atime_ns, facts.st_mtime_ns))
    (node.folder / "model" / "more.safetensors").write_bytes(b"")
    assert weights.main(node.words) == Exit.DONE and node.whole()
    assert node.mlflow.asked == ["model/model.safetensors"]


@pytest.mark.parametrize("ranges", [True, False])
def test_a_line_that_breaks_costs_what_was_lost(node: Node, ranges: bool, capsys: Any) -> None:
    """A promotion at night failed on the first reset; sixteen gigabytes began anew each time."""
    node.mlflow.ranges = ranges
    node.mlflow.faults["manifest.json"] = [503, "cut"]
    node.mlflow.faults["model/model.safetensors"] = ["cut", 502, "cut"]
    assert weights.main(node.words) == Exit.DONE and node.whole()
    starts = [int(one.partition("safetensors")[2] or 0) for one in node.mlflow.asked if "safetensors" in one]
    half = len(WEIGHTS) // 2
    assert starts == ([0, half, half, half + half // 2] if ranges else [0, 0, 0, 0])
    assert "try 2 of 5" in capsys.readouterr().err


def test_what_a_killed_container_has_fetched_is_kept(node: Node) -> None:
    """A node that is drained in mid-download began anew; half a file under its name would have been served."""
    node.mlflow.faults["model/model.safetensors"] = ["cut"] * insist.TRIES
    assert weights.main(node.words) == Exit.PREEMPTED and not node.folder.exists()
    node.mlflow.asked.clear()
    assert weights.main(node.words) == Exit.DONE and node.whole()
    (again,) = node.mlflow.asked
    assert again.startswith("model/model.safetensors ")


def test_wrong_bytes_are_asked_for_once_more_and_refused(node: Node, capsys: Any) -> None:
    """A model whose weights were changed in the store came into production; the controller has to see that no try
    helps."""
    node.mlflow.faults["model/model.safetensors"] = ["other bytes"]
    assert weights.main(node.words) == Exit.DONE and node.whole()
    shutil.rmtree(node.cache)
    node.mlflow.faults["model/model.safetensors"] = ["other bytes"] * 2
    assert weights.main(node.words) == Exit.REJECTED and not node.folder.exists()
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert "model.safetensors" in last and "not the bytes that were registered" in last and "Register" in last
    node.manifest.model_copy(update={"key": "1" * 20, "sources": []}).save(node.registered / "manifest.json")
    other = Manifest(step="prune", key="0" * 20, kind="model", files=node.manifest.files)
    other.save(node.registered / "manifest.json")
    shutil.rmtree(node.cache)
    assert weights.main(node.words) == Exit.REJECTED and not node.folder.exists()
    assert "another manifest" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("wrong", "code", "said"),
    [
        ("version", Exit.USER, "MLflow has no such thing"),
        ("manifest", Exit.USER, "manifest.json: MLflow has no such thing"),
        ("away", Exit.PREEMPTED, "no success in 5 tries"),
        ("digest", Exit.USER, "not the digest of a manifest"),
        ("uri", Exit.USER, "MLFLOW_TRACKING_URI: pods ask an MLflow server"),
        ("source", Exit.USER, "where a pod cannot read them"),
        ("room", Exit.FAULT, "the cache has no room"),
        ("page", Exit.USER, "no answer of MLflow's"),
    ],
)
def test_what_is_in_the_way_is_the_last_word(
    node: Node, monkeypatch: pytest.MonkeyPatch, capsys: Any, wrong: str, code: Exit, said: str
) -> None:
    """A container that ends with a traceback says to `kubectl describe` where Python was, not what to do."""
    words = node.words
    if wrong == "version":
        words[3] = "4"
    elif wrong == "manifest":
        (node.registered / "manifest.json").unlink()
    elif wrong == "away":
        node.mlflow.server_close()
        node.mlflow.shutdown()
    elif wrong == "digest":
        words[5] = "../../etc"
    elif wrong == "uri":
        monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:////runs/mlflow.db")
    elif wrong == "source":
        node.mlflow.source = "gs://bucket/models"
    elif wrong == "room":
        node.cache.mkdir()
        usage = shutil.disk_usage(node.cache)
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    else:
        monkeypatch.setattr(Handler, "do_GET", lambda self: self.say(200, b"<html>"))
    assert weights.main(words) == code
    assert said in capsys.readouterr().err.strip().splitlines()[-1]


def test_credentials_are_those_of_mlflow(node: Node, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """A registry with passwords could not be served from; a password in the URL stood in the pod's status."""
    pair = base64.b64encode(b"me:se cret").decode()
    node.mlflow.authorization = f"Basic {pair}"
    assert weights.main(node.words) == Exit.USER and "lets nobody in" in capsys.readouterr().err
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "me")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "se cret")
    assert weights.main(node.words) == Exit.DONE
    monkeypatch.delenv("MLFLOW_TRACKING_USERNAME")
    shutil.rmtree(node.cache)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", node.mlflow.url.replace("//", "//me:se%20cret@"))
    assert weights.main(node.words) == Exit.DONE
    node.mlflow.authorization = "Bearer token"
    assert weights.main([*node.words[:-1], str(node.cache / "b")]) == Exit.USER
    assert "cret" not in capsys.readouterr().err
    monkeypatch.setenv("MLFLOW_TRACKING_URI", node.mlflow.url)
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", "token")
    assert weights.main([*node.words[:-1], str(node.cache / "b")]) == Exit.DONE


def test_from_a_folder_and_from_s3(node: Node, s3: Bucket) -> None:
    """Artifacts that MLflow does not pass on lie in a bucket, or on a volume that nodes mount."""
    node.mlflow.source = node.registered.as_uri()
    assert weights.main(node.words) == Exit.DONE and node.whole() and node.mlflow.asked == []
    shutil.rmtree(node.cache)
    for path in node.registered.rglob("*"):
        if path.is_file():
            s3.put(f"1/models/m-1/{path.relative_to(node.registered)}", path.read_bytes())
    node.mlflow.source = "s3://b/1/models/m-1"
    s3.faults["GET 1/models/m-1/model/model.safetensors"] = ["cut", 503]
    assert weights.main(node.words) == Exit.DONE and node.whole() and node.mlflow.asked == []


def test_two_pods_of_a_node_fetch_a_version_once(node: Node) -> None:
    """Two replicas wrote the same file at once, and both had the load of the other."""
    command = [sys.executable, "-m", "nvila.components.serve.weights", *node.words]
    both = [subprocess.Popen(command, stderr=subprocess.PIPE, env=for_child()) for _ in range(2)]
    said = [one.communicate(timeout=120)[1].decode() for one in both]
    assert [one.returncode for one in both] == [0, 0], said
    assert node.whole() and len(node.mlflow.asked) == 3
    assert sorted("3 of them fetched" in one or "2 of them fetched" in one for one in said) == [False, True], said
