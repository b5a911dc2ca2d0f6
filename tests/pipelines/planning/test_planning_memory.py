"""Runs memory_measured.py in an interpreter of its own: other tests leave DeepSpeed's groups and patched kernels."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
@pytest.mark.turns(3, 0)
def test_the_memory_formula_against_measurements() -> None:
    """Bytes measured in a process where something else has run first are not those of a training process."""
    measured = Path(__file__).with_name("memory_measured.py")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(measured)]
    ran = subprocess.run(command, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout + ran.stderr
