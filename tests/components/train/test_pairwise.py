"""Every pair of options that go together, in few ways to train a stage; other ways each day."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pairwise
import pytest
from matrix import write_answers
from turns import TODAY

from nvila.components.train.loop import train

WAYS = pairwise.cover(pairwise.here(), TODAY)


@pytest.fixture(scope="module")
def samples(small: Any, tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_answers(small.root, tmp_path_factory.mktemp("pairwise") / "samples.parquet")


@pytest.fixture(scope="module")
def first_loss(small: Any, samples: str, tmp_path_factory: pytest.TempPathFactory) -> float:
    """Of the model before training."""
    folder = tmp_path_factory.mktemp("plain") / "out"
    return pairwise.first_loss(str(small.model.dir("model")), samples, folder)


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize("cell", WAYS, ids=str)
def test_a_way_trains_what_it_says_and_nothing_else(
    small: Any, samples: str, first_loss: float, tmp_path: Path, cell: pairwise.Cell
) -> None:
    """Options that work alone undo each other: frozen weights that move, adapters that do not, another first loss."""
    job = pairwise.job(cell, str(small.model.dir("model")), samples, tmp_path / "out")
    train(job, pairwise.Never())  # type: ignore[arg-type]
    assert pairwise.wrong(cell, job, first_loss) == []


def test_every_pair_of_options_is_in_one_of_them() -> None:
    """A pair that no way has is tried by nobody."""
    wanted = {pair for cell in pairwise.here() for pair in pairwise.pairs(cell)}
    assert {pair for cell in WAYS for pair in pairwise.pairs(cell)} == wanted
    assert 20 <= len(WAYS) <= 30
