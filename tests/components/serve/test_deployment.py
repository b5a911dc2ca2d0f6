from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from pydantic import SecretStr

from nvila.components.contracts.processes import birth
from nvila.components.serve import deployment
from nvila.components.serve.deployment import Status, Wanted


@pytest.mark.parametrize(("since", "ends"), [("boot", True), ("epoch", True), ("another", False)])
def test_a_server_of_an_earlier_version_is_ended_and_nothing_else(tmp_path: Path, since: str, ends: bool) -> None:
    """After an update its port was taken by a server that no command knew; a later process of its number is another."""
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], start_new_session=True)
    born = {"boot": birth(child.pid), "epoch": psutil.Process(child.pid).create_time(), "another": 1.0}[since]
    record = tmp_path / "serving" / "endpoint.json"
    record.parent.mkdir()
    record.write_text(json.dumps({"pid": child.pid, "born": born, "model": "small", "version": "1", "url": "there"}))
    assert bool(deployment.end(tmp_path)) == ends
    assert (birth(child.pid) is None) == ends and not record.exists()
    child.kill()
    child.wait()


@pytest.mark.parametrize("record", [Wanted, Status])
@pytest.mark.parametrize("content", [b"", b"{", bytes(30), b"\xff", b"[]", b'{"port": 0}', None])
def test_a_torn_record_is_none(tmp_path: Path, record: type[Wanted | Status], content: bytes | None) -> None:
    """A record that a crash left half ended every further rollout, `serve` and `stop`."""
    path = deployment.place(tmp_path, record)
    path.parent.mkdir(parents=True)
    path.mkdir() if content is None else path.write_bytes(content)
    assert deployment.read(tmp_path, record) is None
    assert deployment.end(tmp_path) == [] and not path.exists()


def test_a_key_is_known_again_by_nothing_but_itself() -> None:
    """The record of a key must neither show it nor pass for another one's, an open endpoint's among them."""
    key, empty = SecretStr("sesame"), SecretStr("")
    known = deployment.fingerprint(key)
    assert known and "sesame" not in known and known != deployment.fingerprint(key)
    assert deployment.matches(known, key) and deployment.matches(None, None)
    assert deployment.matches(deployment.fingerprint(empty), empty)
    assert not any(deployment.matches(known, other) for other in (None, empty, SecretStr("sesam")))
    assert not deployment.matches(None, key) and not deployment.matches("torn", key)
