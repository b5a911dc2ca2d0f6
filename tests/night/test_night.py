from __future__ import annotations

import hashlib
import random
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from cell import run_cell
from ground import NEEDED, Ground, prepared
from night import cells
from places import variable
from scenarios import Scenario

CELLS = 6
"""That each commit plays."""
pytestmark = pytest.mark.cluster


def chosen() -> list[tuple[Scenario, str]]:
    """Other ones for each commit, so that all come round that need no vLLM."""
    small = [(scenario, kill) for scenario, kill in cells() if not scenario.served.real]
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, cwd=Path(__file__).parent).stdout
    return random.Random(hashlib.sha256(commit).digest()).sample(small, CELLS)


@pytest.fixture(scope="module")
def ground() -> Iterator[Ground]:
    for name in NEEDED:
        variable(name)
    with prepared() as found:
        yield found


@pytest.mark.parametrize(("scenario", "kill"), chosen(), ids=lambda value: getattr(value, "name", value))
def test_a_promotion_ends_as_it_has_to_and_costs_nobody_an_answer(
    ground: Ground, scenario: Scenario, kill: str
) -> None:
    """`make night` plays the whole matrix; a kind of promotion that went wrong in the night was nobody's test."""
    row = run_cell(ground, scenario, kill)
    assert row.right, "\n".join([str(row), *row.faults])
