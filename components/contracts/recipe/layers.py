"""A recipe in layers: what extends it, a form or the command line laid over it; every value knows where it comes from.

The rule: sections merge key by key. Whatever else a layer says replaces what lies below: a number, a text, a list, a
table of names (`data` of a stage, `min_accuracy`). `null` takes a key away, so that its default counts. Over a list of
sections a mapping changes single ones: stages by their step (`train-4`), sources by their name.
"""

from __future__ import annotations

import difflib
import re
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from nvila.components.contracts.errors import ConfigError
from nvila.components.contracts.places import Located
from nvila.components.contracts.recipe.recipe import Recipe
from nvila.components.contracts.steps import STEPS
from nvila.components.contracts.text import as_many, brief

EXTENDS = "extends"
"""Key of a recipe that names another, whose values it changes."""
HINTS = {
    "model.variant": "It decides nothing: delete it.",
    EXTENDS: "Only a recipe itself says what it extends, in its first lines.",
    "<<": "YAML 1.2 has no merge keys: write the keys out, or extend a recipe.",
}
"""What to say of keys that a recipe had, or that stand elsewhere."""
ROOM = 1000
"""Characters of a message for the mistakes of a recipe."""
STEP_OF = {place: row.name for row in STEPS for place in row.recipe.values()}
"""The step by the place in the recipe that it takes: `train.stages.3` is that of `train-4`."""


@dataclass(frozen=True)
class Value:
    """What one layer says of one option."""

    content: Any
    source: str


Tree = Value | dict[str, Any] | list[Any]
"""A section is a dictionary of trees; a list of sections is a list of them, or in a layer over it a dictionary."""


@dataclass(frozen=True)
class Layers:
    """All layers of one recipe, laid over each other."""

    name: str
    """What messages call it: a shipped name, a file, or `recipe`."""
    tree: dict[str, Any] = field(default_factory=dict)
    faults: tuple[ConfigError, ...] = ()
    """What is wrong with single layers: keys that no recipe has, entries that are not there. `recipe` raises them."""

    def over(self, content: Mapping[str, Any], source: str, folder: str = "") -> Layers:
        """With one more layer on top, whose relative paths begin at `folder` where one is given."""
        faults = list(self.faults)
        tree = layer(content, source, faults, folder)
        return Layers(self.name, _merge(self.tree, tree, (), source, faults), tuple(faults))

    @property
    def content(self) -> dict[str, Any]:
        """What they say, null included."""
        return _content(self.tree)

    def recipe(self) -> Recipe:
        """What they come to.

        Raises:
            ConfigError: every mistake, with the dotted option, its value and where it stands.
        """
        faults = list(self.faults)
        try:
            made = Recipe.model_validate(_without_nulls(self.content))
        except ValidationError as error:
            faults += map(self._fault, error.errors(include_url=False))
        if faults:
            raise together(faults, self.name)
        return made

    def source(self, path: Iterable[str | int]) -> str | None:
        """Which layer says the option at this path; None where none does, and the default counts.

        An entry of a list has no default: null leaves it out.
        """
        tree: Any = self.tree
        entry = False
        for part in path:
            if isinstance(tree, Value) or tree is None:
                break
            entry = isinstance(tree, list)
            tree = tree[int(part)] if entry else tree.get(part)
        return tree.source if isinstance(tree, Value) and (entry or tree.content is not None) else None

    def _fault(self, found: ErrorDetails) -> ConfigError:
        dotted = ".".join(brief(str(part)) for part in found["loc"])
        if found["type"] == "missing":
            return ConfigError(f"recipe key {dotted} is missing", where=self.name)
        message = brief(re.sub(r"^Value error, ", "", found["msg"]), 400)
        where = self.source(found["loc"]) or self.name
        return ConfigError(f"{dotted or 'recipe'}: {message}", where=where, value=short(found.get("input")))


def together(faults: Sequence[ConfigError], name: str) -> ConfigError:
    """The mistakes of the recipe `name` as one error, a line each; of very many the first."""
    if len(faults) == 1:
        return faults[0]
    lines = [brief(str(fault).removeprefix(f"{name}: "), 300) for fault in faults]
    return ConfigError("\n  ".join([f"{len(faults)} mistakes", *as_many(lines, ROOM)]), where=name)


def short(value: Any) -> Any:
    """What a message shows of a value: none that holds others, of which YAML's references make any number."""
    return None if isinstance(value, (dict, list)) else value


def parse_recipe(content: Mapping[str, Any], where: str = "recipe") -> Recipe:
    """Check a recipe of one layer.

    Args:
        content: the YAML document.
        where: file name for messages.

    Raises:
        ConfigError: names the dotted option, the value and, for an unknown key, the nearest right one.
    """
    return Layers(where).over(content, where).recipe()


def layer(content: Mapping[str, Any], source: str, faults: list[ConfigError], folder: str = "") -> Tree:
    """One layer as a tree; keys that no recipe has are left out and become `faults`."""
    reading = _Reading(source, folder)
    tree = reading.tree(content, Recipe, [])
    faults += [_unknown(path, known, source) for path, known in reading.unknown]
    return tree


def _content(tree: Tree) -> Any:
    if isinstance(tree, dict):
        return {key: _content(below) for key, below in tree.items()}
    return [_content(below) for below in tree] if isinstance(tree, list) else tree.content


def _without_nulls(content: Any) -> Any:
    """Without the keys that are null; an entry of a list that is null stays: a stage that is left out."""
    if isinstance(content, Mapping):
        return {key: _without_nulls(below) for key, below in content.items() if below is not None}
    return [_without_nulls(below) for below in content] if isinstance(content, list) else content


@dataclass(frozen=True)
class _Reading:
    """From the content of a layer to its tree, by the schema."""

    source: str
    folder: str
    unknown: list[tuple[list[str], list[str]]] = field(default_factory=list)
    """Path of each key that the schema does not know, and the keys that it knows there."""

    def tree(self, content: Any, kind: Any, path: list[str]) -> Tree:
        section, listed = _section(kind)
        if section and listed and isinstance(content, list):
            return [self.tree(below, section, [*path, str(index)]) for index, below in enumerate(content)]
        if section is None or not isinstance(content, Mapping):
            return Value(content, self.source)  # where that is no section at all, the schema says so
        if listed:
            return {key: self.tree(below, section, [*path, str(key)]) for key, below in content.items()}
        fields = {option.alias or name: option for name, option in section.model_fields.items()}
        known = sorted(fields) if path else sorted([*fields, EXTENDS])
        self.unknown.extend(([*path, str(key)], known) for key in content if key not in fields)
        return {key: self._option(content[key], fields[key], [*path, key]) for key in content if key in fields}

    def _option(self, content: Any, option: FieldInfo, path: list[str]) -> Tree:
        kinds = typing.get_args(option.annotation)  # of an option that may be null
        marks = (*option.metadata, *(mark for kind in kinds for mark in getattr(kind, "__metadata__", ())))
        located = next((mark for mark in marks if isinstance(mark, Located)), None)
        if located and self.folder and isinstance(content, str):
            content = located.below(self.folder, content)
        return self.tree(content, option.annotation, path)


def _section(kind: Any) -> tuple[type[BaseModel] | None, bool]:
    """The section that a field holds, and whether it is a list of them; None for a field that holds none."""
    listed = False
    while origin := typing.get_origin(kind):
        if origin in (typing.Union, types.UnionType):
            kind = next(argument for argument in typing.get_args(kind) if argument is not types.NoneType)
        elif origin is list:
            listed, kind = True, typing.get_args(kind)[0]
        else:
            return None, False
    return (kind, listed) if isinstance(kind, type) and issubclass(kind, BaseModel) else (None, False)


def _merge(base: Tree | None, over: Tree, path: Sequence[str], source: str, faults: list[ConfigError]) -> Any:
    if not isinstance(over, dict) or not isinstance(base, dict | list):
        return over
    if isinstance(base, dict):
        changed = {key: _merge(base.get(key), below, [*path, key], source, faults) for key, below in over.items()}
        return base | changed
    entries = list(base)
    for key, below in over.items():
        try:
            index = index_of(base, key, path, source)
        except ConfigError as error:
            faults.append(error)
        else:
            entries[index] = _merge(base[index], below, [*path, str(index)], source, faults)
    return entries


def index_of(entries: list[Any], key: str, path: Sequence[str], source: str) -> int:
    """Which entry of a list is meant: by its name, or as messages count, from 0.

    Raises:
        ConfigError: there is no such entry.
    """
    names = _names(entries, path)
    if key in names:
        return names.index(key)
    if isinstance(key, str) and re.fullmatch("[0-9]{1,9}", key) and int(key) < len(entries):
        return int(key)
    dotted = brief(".".join(path))
    there = brief(", ".join(filter(None, names)) or f"0 to {len(entries) - 1}", 300)
    raise ConfigError(f"{dotted} has no entry '{brief(key)}'", where=source, do=f"There are {there}.")


def _names(entries: list[Tree], path: Sequence[str]) -> list[str]:
    """How layers call the entries of a list of sections."""
    said = [entry.get("name") if isinstance(entry, dict) else None for entry in entries]
    own = [str(name.content) if isinstance(name, Value) else "" for name in said]
    return [STEP_OF.get(".".join([*path, str(index)]), name) for index, name in enumerate(own)]


def _unknown(path: list[str], known: list[str], source: str) -> ConfigError:
    parts = [*map(brief, path)]
    dotted = ".".join(parts)
    near = difflib.get_close_matches(parts[-1], known, n=1, cutoff=0.5)
    hint = f"Did you mean {'.'.join([*parts[:-1], near[0]])}?" if near else f"Known here: {', '.join(known)}"
    return ConfigError(f"unknown recipe key {dotted}", where=source, do=HINTS.get(dotted, HINTS.get(parts[-1], hint)))
