"""The JSON schema of recipes: editors accept with it what the platform reads, and mark what it refuses."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from nvila.components.contracts.recipe.reader import shipped, shipped_document
from nvila.components.contracts.recipe.yaml12 import load_yaml
from nvila.pipelines.commands import schema

EDITOR = jsonschema.Draft202012Validator(json.loads(schema.as_text()))
README = Path(__file__).parents[2] / "README.md"


def test_it_takes_every_recipe_that_is_shipped_or_shown() -> None:
    """An editor that marks right lines red is switched off."""
    shown = re.search(r"```yaml\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.DOTALL)
    assert shown
    EDITOR.check_schema(EDITOR.schema)
    texts = [shown[1], *(shipped_document(name).text for name in shipped())]
    texts.append("extends: tiny\nseed: null\ndata: {sources: {digits: {path: x}}}\ntrain: {stages: {train-2: null}}")
    assert [list(EDITOR.iter_errors(load_yaml(text))) for text in texts] == [[]] * len(texts)


@pytest.mark.parametrize(
    "content",
    [
        {"trian": {}},
        {"seed": -1},
        {"evaluate": {"batch": "yes"}},
        {"train": {"stages": {"train-4": {"bach": 8}}}},
        {"data": {"sources": [{"name": "a", "kind": "picture", "path": "x"}]}},
        {"extends": ["tiny"]},
    ],
    ids=str,
)
def test_it_marks_what_is_refused(content: dict[str, Any]) -> None:
    """A mistake that only the command line finds is found later."""
    assert list(EDITOR.iter_errors(content))


def test_the_reference_has_every_key() -> None:
    """A key that is not in the reference is not used."""
    paths = [path for path, *_ in schema.every_key()]
    assert len(paths) > 100 and {"train.stages.*.batch", "data.sources.*.path", "model.base.tower.hidden"} <= {*paths}
    assert all(kind and about for _, kind, _, about in schema.every_key())
