"""`nvila recipe`: the shipped recipes, and what a recipe comes to with all that it extends."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any

from nvila.components.contracts.recipe.layers import Layers
from nvila.components.contracts.recipe.reader import layers, named_document, shipped, shipped_document
from nvila.components.contracts.recipe.yaml12 import dump_yaml
from nvila.pipelines.commands.overrides import OPTION, parse_overrides

DEFAULT = "default"
"""Where a value comes from that no layer says."""
COLUMN = 56
"""Where the sources stand, behind all but the longest lines."""

Path = tuple[str | int, ...]


def listing() -> str:
    """The shipped recipes by name, each with the first line of its file."""
    width = max(map(len, shipped()))
    return "\n".join(f"{name:{width}}  {shipped_document(name).about}" for name in shipped())


def show(recipe: str, overrides: Iterable[str]) -> str:
    """The whole recipe as YAML, each value with where it comes from as a remark.

    Raises:
        ConfigError: the recipe or an override is wrong.
    """
    laid = layers(named_document(recipe), located=True)
    laid = laid.over(parse_overrides(laid, overrides), OPTION)
    content = laid.recipe().model_dump(mode="json", by_alias=True)
    parts = (line.partition("\0") for line in _mapping(content, (), laid))
    return "\n".join(f"{text:{COLUMN}}  # {source}" if source else text for text, _, source in parts)


def _mapping(content: dict[str, Any], path: Path, laid: Layers) -> Iterator[str]:
    """Lines of YAML, with the source behind a NUL."""
    for key, below in content.items():
        place = (*path, key)
        if isinstance(below, dict) and below:
            yield f"{_flow(key)}:"
            yield from _indented(_mapping(below, place, laid))
        elif isinstance(below, list) and any(isinstance(entry, dict) for entry in below):
            yield f"{_flow(key)}:"
            for index, entry in enumerate(below):
                at = (*place, index)
                lines = _mapping(entry, at, laid) if entry else iter([f"null\0{laid.source(at)}"])
                yield f"  - {next(lines)}"
                yield from _indented(lines, "    ")
        else:
            yield f"{_flow(key)}: {_flow(below)}\0{laid.source(place) or DEFAULT}"


def _flow(value: Any) -> str:
    """In one line, and by the rules of YAML: JSON's 1e-05 is a text to it."""
    return dump_yaml([value], default_flow_style=True, width=math.inf).strip()[1:-1]


def _indented(lines: Iterator[str], by: str = "  ") -> Iterator[str]:
    return (by + line for line in lines)
