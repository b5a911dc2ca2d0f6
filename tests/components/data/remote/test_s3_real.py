"""Weights from a real S3 server: what the stand-in of the other tests takes for granted."""

from __future__ import annotations

import io
import json
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from nvila.components.contracts.errors import DataError
from nvila.components.data.fetch import fetch, identity
from nvila.components.data.remote.s3text import read_bytes

TOOLS = Path(__file__).parents[4] / ".tools" / "python"
MIB = 1 << 20


def _free_ports(count: int) -> list[int]:
    """SeaweedFS takes a second port 10000 above each; both are looked at, and lie below those of clients' own ends."""
    found = []
    for port in range(10000 + os.getpid() % 10000, 22000):
        with socket.socket() as one, socket.socket() as other:
            try:
                one.bind(("127.0.0.1", port))
                other.bind(("127.0.0.1", port + 10000))
            except OSError:
                continue
        found.append(port)
        if len(found) == count:
            break
    return found


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A client of a store with the bucket `nvila`."""
    import boto3

    weed = shutil.which("weed", path=f"{TOOLS / 'bin'}:{os.environ['PATH']}")
    if weed is None:
        pytest.skip("weed is not here: make tools")
    identities = [{"name": "t", "credentials": [{"accessKey": "key", "secretKey": "secret"}], "actions": ["Admin"]}]
    (tmp_path / "s3.json").write_text(json.dumps({"identities": identities}))
    (tmp_path / "weed").mkdir()
    master, volume, filer, port = _free_ports(4)
    command = [weed, "server", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", f"-dir={tmp_path / 'weed'}", "-volume.max=8"]
    command += ["-s3", f"-s3.port={port}", f"-s3.config={tmp_path / 's3.json'}", "-master.volumeSizeLimitMB=64"]
    command += [f"-master.port={master}", f"-volume.port={volume}", f"-filer.port={filer}"]
    monkeypatch.setattr(boto3, "DEFAULT_SESSION", None)
    for name, value in {
        "NVILA_CACHE": str(tmp_path / "cache"),
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(name, value)
    environment = os.environ | {"PYTHONPATH": str(TOOLS)}
    with (tmp_path / "log").open("w") as log, subprocess.Popen(command, stdout=log, stderr=log, env=environment) as one:
        try:
            client = boto3.client("s3")
            deadline = time.monotonic() + 300
            while True:
                try:
                    client.create_bucket(Bucket="nvila")
                    break
                except Exception:
                    ended, late = one.poll() is not None, time.monotonic() > deadline
                    if ended or late:
                        said = (tmp_path / "log").read_text(errors="replace")[-2000:]
                        pytest.fail(f"the store {'has ended' if ended else 'does not answer'}: {said}")
                    time.sleep(0.5)
            yield client
        finally:
            one.kill()  # asked to stop it takes half a minute


@pytest.mark.slow
def test_a_checkpoint_of_a_real_store(store: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """An answer of half an object, a condition on the ETag and sizes of parts are where servers differ."""
    body = os.urandom(21 * MIB + 17)
    store.upload_fileobj(io.BytesIO(body), "nvila", "m/model.safetensors")  # in parts
    store.put_object(Bucket="nvila", Key="m/one.safetensors", Body=body, ChecksumAlgorithm="SHA256")
    store.put_object(Bucket="nvila", Key="m/config.json", Body=b"{}")
    assert read_bytes("s3://nvila/m/config.json", 1) == b"{", "as a recipe is read"
    folder = fetch("s3://nvila/m")
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == {
        "model.safetensors": body,
        "one.safetensors": body,
        "config.json": b"{}",
    }
    before = identity("s3://nvila/m")
    store.put_object(Bucket="nvila", Key="m/config.json", Body=b"[]")
    store.delete_object(Bucket="nvila", Key="m/one.safetensors")
    assert identity("s3://nvila/m") != before and fetch("s3://nvila/m") == folder
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]
    assert (folder / "config.json").read_bytes() == b"[]"
    with pytest.raises(DataError, match="NoSuchBucket"):
        fetch("s3://other/m")
    with pytest.raises(DataError, match="NoSuchKey"):
        read_bytes("s3://nvila/m/none.yaml", 1)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "other")
    monkeypatch.setattr("boto3.DEFAULT_SESSION", None)
    with pytest.raises(DataError, match=r"SignatureDoesNotMatch.*Check AWS_SECRET_ACCESS_KEY"):
        fetch("s3://nvila/m")
