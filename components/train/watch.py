"""What is wrong with the loss of a step, said before the step changes a weight."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable
from statistics import median

WINDOW_STEPS = 100
"""Losses that a spike stands out from; the newest are few where a stage begins."""
LEAST_STEPS = 10
"""Losses without which no median says what is usual."""


class Watch:
    """Knows the losses of the steps that were taken."""

    def __init__(self, spike_factor: float | None, losses: Iterable[float | None]) -> None:
        """`losses` are those of the steps that lie behind, as they were logged."""
        self._factor = spike_factor
        self._usual = deque((loss for loss in losses if loss is not None), WINDOW_STEPS)

    def fault(self, loss: float | None) -> str | None:
        """What is wrong with a loss (None: there was no supervised token), or None; a good one is remembered."""
        if loss is None:
            return None
        if not math.isfinite(loss):
            return "the loss is not finite"
        if self._factor and len(self._usual) >= LEAST_STEPS and loss > self._factor * median(self._usual):
            return f"the loss is above {self._factor} times its median"
        self._usual.append(loss)
        return None
