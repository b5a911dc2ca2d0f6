"""`--override key=value` of the command line, as a mapping to lay over the recipe."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

import yaml

from nvila.components.contracts.errors import ConfigError
from nvila.components.contracts.recipe.reader import load_yaml
from nvila.components.contracts.recipe.recipe import merge


def parse_overrides(content: Mapping[str, Any], pairs: Iterable[str]) -> dict[str, Any]:
    """Overrides from `dotted.key=value` pairs; values are JSON or YAML.

    A number in the key is an index of a list: the list is then taken from `content`, so that
    `train.stages.3.learning_rate=1e-3` changes one number of one stage.

    Raises:
        ConfigError: a pair without `=`, or an index that the recipe does not have.
    """
    overrides: dict[str, Any] = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        if not equals or not key:
            raise ConfigError("an override is written dotted.key=value", where="--override", value=pair)
        overrides = merge(overrides, _nest(merge(content, overrides), key.split("."), _value(text), key))
    return overrides


def _nest(content: Any, path: list[str], value: Any, key: str) -> Any:
    """What to lay over `content` so that `path` in it becomes `value`."""
    if not path:
        return value
    head, rest = path[0], path[1:]
    if not isinstance(content, list):
        return {head: _nest(content.get(head) if isinstance(content, Mapping) else None, rest, value, key)}
    if not head.isdecimal() or int(head) >= len(content):
        raise ConfigError(f"{head!r} is no index of this list of {len(content)}", where="--override", value=key)
    changed = list(content)
    old = changed[int(head)]
    new = _nest(old, rest, value, key)
    changed[int(head)] = merge(old, new) if isinstance(old, Mapping) and isinstance(new, Mapping) else new
    return changed


def _value(text: str) -> Any:
    try:
        return json.loads(text)  # first, because YAML reads 1e-3 as a string
    except json.JSONDecodeError:
        pass
    try:
        return load_yaml(text)
    except yaml.YAMLError:
        return text
