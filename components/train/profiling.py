"""Torch's profiler over a few optimizer steps of a stage (`nvila run --profile`), of rank 0 alone."""

from __future__ import annotations

from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from nvila.components.contracts.meter import PROFILE
from nvila.components.contracts.text import say

BEFORE = 2
"""Steps that are left out, where the stage has more: the first ones allocate, compile and fill caches."""
STEPS = 3
"""That are profiled."""
ROWS = 40
"""Of the table: the operations that take longest by themselves."""


class Profile:
    """`profile/trace.json` (chrome://tracing, Perfetto) and `profile/table.txt` in the folder of a stage."""

    def __init__(self, out: Path, steps: int) -> None:
        """`steps` are still to come."""
        self._out, self._done = out, 0
        self._first = max(0, min(BEFORE, steps - STEPS))
        self._last = min(self._first + STEPS, steps)
        gpu = [ProfilerActivity.CUDA] if torch.cuda.is_available() else []
        self._profile = profile(activities=[ProfilerActivity.CPU, *gpu])
        self._go_on()

    def step(self) -> None:
        """An optimizer step is over."""
        self._done += 1
        self._go_on()

    def _go_on(self) -> None:
        if self._done == self._last:
            self._profile.stop()
            self._write()
        elif self._done == self._first:
            self._profile.start()

    def _write(self) -> None:
        trace, table = self._out / PROFILE, (self._out / PROFILE).with_name("table.txt")
        trace.parent.mkdir(exist_ok=True)
        self._profile.export_chrome_trace(str(trace))
        by = "self_cuda_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
        table.write_text(self._profile.key_averages().table(sort_by=by, row_limit=ROWS), encoding="utf-8")
        say(f"profile of {self._last - self._first} optimizer steps: {trace}, {table}")
