"""The command line as a user starts it."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

Nvila = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def nvila(tmp_path: Path) -> Nvila:
    """Run `nvila ARGS` in an empty folder."""

    def start(*args: str, cwd: Path = tmp_path) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "nvila.pipelines.cli", *args]
        return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=120)

    return start
