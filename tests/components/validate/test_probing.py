"""Probing of many files: one bad decoder does not end the step."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from PIL import Image

from nvila.components.data.media import Limits
from nvila.components.validate import probing
from nvila.components.validate.probing import Medium, probe_all


def test_a_crashing_decoder_is_a_finding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prevents one hostile file that kills its process from ending the validation of all others."""
    names = [f"{index}.png" for index in range(12)]
    for index, name in enumerate(names):
        Image.new("RGB", (9, 9), (index, 0, 0)).save(tmp_path / name)
    real = probing.probe

    def crash(path: Path, *rest: Any) -> Any:
        if path.name == "5.png":
            os.kill(os.getpid(), signal.SIGSEGV)
        return real(path, *rest)

    monkeypatch.setattr(probing, "probe", crash)
    monkeypatch.setattr(probing, "CHUNK", 3)
    media = [Medium(str(tmp_path), name, "image") for name in names]
    found = probe_all(media, Limits())
    assert [found[medium].status for medium in media] == ["ok"] * 5 + ["undecodable"] + ["ok"] * 6
    assert found[media[5]].detail == "the decoder crashed: it was killed by signal 11 (SIGSEGV)"


PROBE = """
import os, sys, time
from pathlib import Path
from nvila.components.data.media import Limits
from nvila.components.validate import probing

def slow(path, *rest):
    Path(path, str(os.getpid())).touch()
    time.sleep(60)

probing.probe, probing.medium_sha256, probing.CHUNK = slow, str, 1
probing.probe_all([probing.Medium(sys.argv[1], name, "image") for name in "ab"], Limits())
"""


def test_a_killed_step_leaves_no_decoder_behind(tmp_path: Path) -> None:
    """Both waited for ever for what nobody would ask, with the memory of a step."""
    for name in "ab":
        (tmp_path / name).mkdir()
    step = subprocess.Popen([sys.executable, "-c", PROBE, str(tmp_path)])
    deadline = time.monotonic() + 60
    while len(pids := [int(path.name) for path in tmp_path.glob("?/*")]) < 2:
        assert step.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    decoders = [psutil.Process(pid) for pid in pids]
    step.kill()
    step.wait()
    assert not psutil.wait_procs(decoders, timeout=10)[1]
