from __future__ import annotations

import pytest
import torch

from nvila.components.model.schedule import one_cycle


@pytest.mark.parametrize("steps", [*range(1, 32), 100, 1000])
def test_any_number_of_steps_has_a_rate(steps: int) -> None:
    """With ten optimizer steps, of which a tenth is one, a reference of pruning ended with a division by zero."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    schedule, rates = one_cycle(optimizer, 0.5, steps), []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert all(0 < rate <= 0.5 for rate in rates) and (steps < 4 or max(rates) > 0.4)
