"""`--override dotted.key=value`."""

import pytest

from nvila.components.contracts.errors import ConfigError
from nvila.components.contracts.recipe.recipe import merge
from nvila.pipelines.commands.overrides import parse_overrides

CONTENT = {"evaluate": {"limit": 5, "sources": ["a"]}, "train": {"stages": [{"rate": 1, "batch": 2}, {"rate": 3}]}}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("7", 7),
        ("1e-3", 0.001),
        ("null", None),
        ("true", True),
        ("gptq", "gptq"),
        ("2026-11-23", "2026-11-23"),
        ("[a, b]", ["a", "b"]),
        ("", None),
    ],
)
def test_values_get_the_type_they_look_like(text: str, value: object) -> None:
    """`1e-3` is a string to YAML: a learning rate given that way would be refused by the schema. And a model named by
    a day is a date to YAML, which JSON does not know.
    """
    assert parse_overrides(CONTENT, [f"evaluate.limit={text}"]) == {"evaluate": {"limit": value}}


def test_one_field_of_one_stage() -> None:
    """Lists are replaced as a whole when merged: the other stages must come along."""
    changed = merge(CONTENT, parse_overrides(CONTENT, ["train.stages.0.rate=9", "train.stages.1.rate=8"]))
    assert changed["train"]["stages"] == [{"rate": 9, "batch": 2}, {"rate": 8}]


def test_several_overrides_of_one_section_add_up() -> None:
    """The second must not wipe out the first."""
    assert parse_overrides({}, ["a.b=1", "a.c=2"]) == {"a": {"b": 1, "c": 2}}


@pytest.mark.parametrize(
    "pair", ["evaluate.limit", "=3", "train.stages.7.rate=1", "train.stages.x.rate=1", "train.stages.².rate=1"]
)
def test_what_cannot_be_meant_is_refused(pair: str) -> None:
    """A mistyped override that has no effect would train the wrong model for days."""
    with pytest.raises(ConfigError) as caught:
        parse_overrides(CONTENT, [pair])
    assert "--override" in str(caught.value)
