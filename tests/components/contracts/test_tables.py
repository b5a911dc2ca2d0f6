"""The plain tables in which a metric, a precision, a layout and a rollout target stand are whole."""

from collections.abc import Mapping
from typing import Any, get_args

import pytest

from nvila.components.contracts.gpus import Gpu
from nvila.components.contracts.metrics import METRICS, Metric
from nvila.components.contracts.precisions import PRECISIONS, Precision
from nvila.components.contracts.recipe.data import SUFFIXES, Layout
from nvila.components.contracts.recipe.rollout import TARGETS, Target
from nvila.components.data.layouts import READERS
from nvila.components.metrics.accuracy import SCORES
from nvila.components.rollout.step import ACTS


@pytest.mark.parametrize(
    ("names", "tables"),
    [
        (Metric, [METRICS, SCORES]),
        (Precision, [PRECISIONS]),
        (Layout, [SUFFIXES, READERS]),
        (Target, [TARGETS, ACTS]),
    ],
)
def test_what_the_schema_takes_has_a_row_in_every_table(names: Any, tables: list[Mapping[str, Any]]) -> None:
    """A name that the recipe may say and a table lacks would be found after hours, by a KeyError."""
    for table in tables:
        assert set(table) == set(get_args(names))


def test_the_plan_knows_the_speed_of_every_precision() -> None:
    """`nvila plan` looks it up by name."""
    for kept in PRECISIONS.values():
        assert isinstance(getattr(Gpu("any", 1, 1.0, 1.0, None, 1.0), kept.products), float)
