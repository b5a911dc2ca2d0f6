"""Seconds and memory of two ways to do the same thing."""

from __future__ import annotations

import os
import pickle
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

Measured = tuple[str, str, float, float, str] | tuple[str, str, float, float, str, float]


def pair(baseline: Callable[[], Any], ours: Callable[[], Any], times: int = 3) -> tuple[float, float]:
    """Best seconds of both, measured in turns."""
    best = [float("inf"), float("inf")]
    for _ in range(times):
        for index, call in enumerate((baseline, ours)):
            began = time.perf_counter()
            call()
            best[index] = min(best[index], time.perf_counter() - began)
    return best[0], best[1]


def apart(call: Callable[[], Any]) -> tuple[float, float]:
    """Seconds, and the most MiB that a call adds to what there is, in a process of its own."""
    source, target = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
            before, began = _status("VmRSS"), time.perf_counter()
            call()
            done = (time.perf_counter() - began, _status("VmHWM") - before)
            os.write(target, pickle.dumps(done))
        finally:
            os._exit(0)
    os.close(target)
    with os.fdopen(source, "rb") as pipe:
        said = pipe.read()
    os.waitpid(child, 0)
    seconds, mebibytes = pickle.loads(said)
    return seconds, mebibytes


def _status(field: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(f"{field}:"))
