from itertools import pairwise

import pytest

from nvila.components.train.schedule import warmup_cosine


def test_warms_up_linearly_then_falls_to_zero() -> None:
    """Prevents a first step at full learning rate and a schedule that ends above zero."""
    factors = [warmup_cosine(step, 100, 0.03) for step in range(101)]
    assert factors[:4] == pytest.approx([0.25, 0.5, 0.75, 1.0])
    assert all(a >= b for a, b in pairwise(factors[3:]))
    assert factors[100] == pytest.approx(0.0)
    assert factors[3 + 97 // 2] == pytest.approx(0.5, abs=0.02)


def test_a_single_step_learns() -> None:
    """Prevents a stage of one step from running at learning rate zero."""
    assert warmup_cosine(0, 1, 0.03) > 0
