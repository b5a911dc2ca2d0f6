"""Names and texts as the columns of a real database take them."""

from __future__ import annotations

import pytest

from nvila.components.tracking.columns import KEY, excerpt, fitted, key, model_name
from nvila.components.tracking.flatten import metrics, parameters

NAMES = [
    "a/b",
    "",
    "/",
    "..",
    "...",
    "../x",
    "a//b",
    "a/./b",
    "/a",
    "a/",
    "a?b",
    "é/日本",
    "k" * 400,
    "x\0",
    "\udcff",
    "..b",
]


@pytest.mark.parametrize("name", NAMES)
def test_every_name_is_one_that_mlflow_takes(name: str) -> None:
    """A source or a class is called as people call it; MLflow refuses odd names with everything logged beside them."""
    from mlflow.utils.validation import _validate_metric_name, _validate_param_name

    _validate_metric_name(key(name))
    _validate_param_name(key(name))
    assert 0 < len(key(name)) <= KEY


def test_names_that_become_alike_stay_two() -> None:
    """MLflow refuses a parameter that is logged twice; of a metric the last value would be shown."""
    long = "k" * 400
    settings = {"a?": 1, "a*": 2, long: 3, long + "z": 4}
    assert sorted(parameters(settings).values()) == ["1", "2", "3", "4"]
    assert sorted(metrics(settings).values()) == [1, 2, 3, 4]


def test_texts_are_cut_and_cleaned_and_the_cut_is_seen() -> None:
    """Postgres takes neither NUL nor half a character, nor one character more than a column has."""
    assert fitted("a\0b\udcff", 10) == "a\N{REPLACEMENT CHARACTER}b\N{REPLACEMENT CHARACTER}"
    assert fitted("x" * 501, 500) == "x" * 497 + "..." and fitted("x" * 500, 500) == "x" * 500
    card = excerpt("# title\n" + "| row |\n" * 1000, 5000, "the rest is a file")
    assert len(card) <= 5000 and card.endswith("| row |\n\n*Cut: the rest is a file.*\n")
    assert model_name("nvila-1.5") == "nvila-1-5"
