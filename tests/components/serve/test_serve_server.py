from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from nvila.components.contracts.errors import PreflightError, RolloutError
from nvila.components.serve import server
from nvila.components.serve.ports import free_port


@pytest.fixture
def listener() -> Iterator[int]:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        sock.listen()
        yield sock.getsockname()[1]


def test_port_in_use_is_named(listener: int, tmp_path: Path) -> None:
    """vLLM would say so after half a minute of loading, in the middle of its log."""
    with pytest.raises(PreflightError, match=rf"^127\.0\.0\.1:{listener}: .*in use"):
        server.start(tmp_path, port=listener, served_name="m", log_path=tmp_path / "log")


def test_server_that_dies_while_starting_shows_its_last_lines(tmp_path: Path) -> None:
    """Waiting for a deadline on a dead process, without its reason, hides what to do."""
    log = tmp_path / "log"
    log.write_text("loading\nno such tensor\n")
    child = subprocess.Popen([sys.executable, "-c", "pass"])
    with pytest.raises(RolloutError, match="ended while starting: loading\nno such tensor"):
        server.wait_ready("http://127.0.0.1:9", 20, child.pid, log)


def test_deadline(tmp_path: Path) -> None:
    """A server that never gets ready must not block the run for ever."""
    with pytest.raises(RolloutError, match="not ready within 1 seconds"):
        server.wait_ready("http://127.0.0.1:9", 1, os.getpid())


def test_stop_ends_the_whole_group_even_when_it_ignores_sigterm() -> None:
    """vLLM is three processes; one left behind keeps the memory and the port."""
    code = (
        "import signal, subprocess, sys, time\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        "print('up', flush=True); time.sleep(60)\n"
    )
    child = subprocess.Popen([sys.executable, "-c", code], start_new_session=True, stdout=subprocess.PIPE)
    assert child.stdout is not None
    child.stdout.readline()
    server.stop(child.pid, grace_seconds=0.5)
    with pytest.raises(ProcessLookupError):
        os.killpg(child.pid, signal.SIGCONT)
    began = time.monotonic()
    server.stop(child.pid)  # nothing there: at once, without an error
    assert time.monotonic() - began < 1


def test_key_is_not_on_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every user of the machine can read another's command line."""
    script = tmp_path / "python"
    script.write_text('#!/bin/sh\necho "$@"\nexit 1\n')
    script.chmod(0o755)
    monkeypatch.setenv("NVILA_SERVE_PYTHON", str(script))
    (tmp_path / "config.json").write_text('{"nvila": {"num_video_frames": 4}}')
    port = free_port("127.0.0.1")
    log = tmp_path / "log"
    started = server.start(tmp_path, port=port, served_name="m", log_path=log, api_key="sesame")
    while server.is_alive(started.pid):
        time.sleep(0.05)
    assert "--served-model-name=m" in log.read_text()
    assert "sesame" not in log.read_text()
