"""What a command asks for: a recipe by name or file, and `--override key=value` laid over it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any

import yaml

from nvila.components.contracts.errors import ConfigError
from nvila.components.contracts.recipe.form import Form, fill_in
from nvila.components.contracts.recipe.layers import Layers, Value, index_of
from nvila.components.contracts.recipe.reader import layers, load_yaml, named_document, self_contained, shipped
from nvila.components.contracts.recipe.recipe import Recipe

OPTION = "--override"


def asked_for(recipe: str, overrides: Iterable[str], **fields: Any) -> tuple[Form, Recipe]:
    """The form of a run, and the checked recipe that it comes to.

    Args:
        recipe: name of a shipped recipe, or path of a YAML file.
        overrides: `dotted.key=value` pairs.
        fields: further fields of the form.

    Raises:
        ConfigError: the recipe or an override is wrong.
    """
    first = named_document(recipe)
    laid = layers(first)
    overlay = parse_overrides(laid, overrides)
    text = recipe if recipe in shipped() else self_contained(first)
    form = Form(recipe=text, overrides=json.dumps(overlay), **fields)
    return form, fill_in(form, recipe=laid)


def parse_overrides(recipe: Layers, pairs: Iterable[str]) -> dict[str, Any]:
    """The layer that `dotted.key=value` pairs come to; values are JSON or YAML.

    A key may go on into a list or a table: `model.s2_scales.0=14` changes one number and keeps the others.

    Raises:
        ConfigError: a pair without `=`, an unknown key, or an index that the recipe does not have.
    """
    overlay = Layers(OPTION)
    for pair in pairs:
        key, equals, text = pair.partition("=")
        if not equals or not key:
            raise ConfigError("an override is written dotted.key=value", where=OPTION, value=pair)
        one = _nest(recipe.tree, key.split("."), _value(text), ())
        recipe, overlay = recipe.over(one, OPTION), overlay.over(one, OPTION)
    return overlay.content


def _nest(tree: Any, path: Sequence[str], value: Any, above: Sequence[str]) -> Any:
    """What to lay over `tree`, which stands at the path `above`, so that `path` in it becomes `value`."""
    if not path:
        return value
    if isinstance(tree, Value):
        return _changed(tree.content, path, value, above)
    head, rest = path[0], path[1:]
    below = tree[index_of(tree, head, above, OPTION)] if isinstance(tree, list) else (tree or {}).get(head)
    return {head: _nest(below, rest, value, [*above, head])}


def _changed(content: Any, path: Sequence[str], value: Any, above: Sequence[str]) -> Any:
    """A copy of a list or a table with one value changed."""
    if not path:
        return value
    head, rest = path[0], path[1:]
    if not isinstance(content, list):
        table = content if isinstance(content, dict) else {}
        return table | {head: _changed(table.get(head), rest, value, [*above, head])}
    index = index_of(content, head, above, OPTION)
    return [*content[:index], _changed(content[index], rest, value, [*above, head]), *content[index + 1 :]]


def _value(text: str) -> Any:
    try:
        return json.loads(text)  # first, because YAML reads 1e-3 as a string
    except json.JSONDecodeError:
        pass
    try:
        return load_yaml(text)
    except yaml.YAMLError:
        return text
