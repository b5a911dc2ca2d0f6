"""The learning rate of plain torch training: of vision towers on labels, and of pruning's references."""

from __future__ import annotations

import torch
from torch.optim.lr_scheduler import OneCycleLR


def one_cycle(optimizer: torch.optim.Optimizer, learning_rate: float, steps: int) -> OneCycleLR:
    """Up for a tenth of the steps, then down.

    Where that tenth is one step exactly, torch divides by zero: it is a little more then.

    Args:
        optimizer: whose rate it sets.
        learning_rate: the highest.
        steps: of the optimizer, 1 or more.
    """
    return OneCycleLR(optimizer, learning_rate, total_steps=steps, pct_start=0.11 if steps == 10 else 0.1)
