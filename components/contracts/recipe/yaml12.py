"""YAML as its version 1.2 means it (core schema), read within bounds, in types that JSON has as well.

`yes`, `off`, `1_000`, `1:30` and dates are texts, `1e-3` and `0o17` are numbers, `<<` is a key like others. Tags of
other types and a key that stands twice are refused. JSON is read by its own rules, which allow what YAML does not.
Whose text it is is left to others.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from itertools import count
from typing import Any

import yaml

from nvila.components.contracts.text import brief

MOST_BYTES = 64 * 1024
"""Of a text: a recipe travels as one argument of a process, of which Linux takes 128 KiB, and JSON makes it longer."""
MOST_VALUES = 20_000
"""In a text, those counted that aliases repeat."""
DEEPEST = 32
MOST_DIGITS = 40
"""Of a number; no option takes half as many."""
_TAG = "tag:yaml.org,2002:"
_INT = r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+"
_FLOAT = r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)"
_SCALARS: dict[str, tuple[str, str]] = {
    "null": (r"~|null|Null|NULL|", "~nN"),
    "bool": (r"true|True|TRUE|false|False|FALSE", "tTfF"),
    "int": (_INT, "-+0123456789"),
    "float": (_FLOAT, "-+.0123456789"),
}
"""How a scalar without quotes is written that is no text, and the characters that it begins with."""
_UNSAFE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")
"""Control characters, and halves of characters: no name or path has them, and no file can hold the latter."""


def load_yaml(text: str) -> Any:
    """What the YAML or JSON text says: mappings with texts as keys, lists, texts, numbers, true, false, null.

    A number without a fraction is an integer, however it is written.

    Raises:
        ValueError: it is neither, or beyond the bounds; in words, with line and column where they are known.
    """
    if len(text.encode(errors="replace")) > MOST_BYTES:
        raise ValueError(f"longer than {MOST_BYTES:,} bytes")
    try:
        return _bounded(_json(text))
    except json.JSONDecodeError:
        pass
    except RecursionError:
        raise ValueError("nested too deeply") from None
    try:
        return _bounded(yaml.load(text, _Loader))
    except yaml.YAMLError as error:
        raise ValueError(_in_words(error)) from None
    except RecursionError:
        raise ValueError("nested too deeply") from None


def dump_yaml(content: Any, **options: Any) -> str:
    """`content` as YAML that versions 1.1 and 1.2 read alike."""
    return yaml.dump(content, Dumper=_Dumper, sort_keys=False, allow_unicode=True, **options)


def _json(text: str) -> Any:
    return json.loads(text, object_pairs_hook=_once, parse_int=_integer, parse_float=_number, parse_constant=str)


def _once(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"the key {brief(key)} stands twice")
        found[key] = value
    return found


def _bounded(content: Any) -> Any:
    """A copy that shares nothing, as aliases do.

    Raises:
        ValueError: it is too large or too deep, or a text or a key cannot be used.
    """
    numbers = count()

    def copy(value: Any, depth: int) -> Any:
        if next(numbers) > MOST_VALUES:
            raise ValueError(f"more than {MOST_VALUES:,} values, with those that aliases repeat")
        if depth > DEEPEST:
            raise ValueError(f"nested too deeply: more than {DEEPEST} levels, or an alias within what it stands for")
        if isinstance(value, dict):
            return {_key(key): copy(below, depth + 1) for key, below in value.items()}
        if isinstance(value, list):
            return [copy(below, depth + 1) for below in value]
        return _usable(value) if isinstance(value, str) else value

    return copy(content, 0)


def _key(key: Any) -> str:
    if not isinstance(key, str):
        raise ValueError(f"the key {brief(json.dumps(key))} is no text, as names of options are")
    return _usable(key)


def _usable(text: str) -> str:
    if found := _UNSAFE.search(text):
        raise ValueError(f"no text of a recipe has the character U+{ord(found[0]):04X}, as '{brief(text)}' does")
    return text


def _integer(text: str) -> int:
    if len(text) > MOST_DIGITS:
        raise ValueError(f"a number of {len(text):,} characters")
    base = {"0o": 8, "0x": 16}.get(text[:2], 10)
    return int(text if base == 10 else text[2:], base)


def _number(text: str) -> float | int:
    if len(text) > MOST_DIGITS:
        raise ValueError(f"a number of {len(text):,} characters")
    number = float(re.sub(r"\.(?=[inIN])", "", text))
    return int(number) if number.is_integer() and abs(number) < 2**53 else number


_READ: dict[str, Callable[[str], Any]] = {
    "null": lambda text: None,
    "bool": lambda text: text.lower() == "true",
    "int": _integer,
    "float": _number,
}


class _Loader(yaml.SafeLoader):
    """The safe loader with the scalars of YAML 1.2 and no other types."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        """As usual, but for a key that is there twice, of which one would be lost."""
        node = super().compose_mapping_node(anchor)
        keys: set[str] = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in keys:
                raise _marked(f"the key {brief(key.value)} stands twice", key)
            keys.add(key.value)
        return node

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        """Merge keys are no part of YAML 1.2."""

    def read_scalar(self, node: yaml.Node) -> Any:
        """A scalar with a type, found by its form or named by a tag."""
        kind = node.tag.removeprefix(_TAG)
        text = self.construct_scalar(node)  # type: ignore[arg-type]  # it refuses other nodes
        if not re.fullmatch(_SCALARS[kind][0], text):
            raise _marked(f"'{brief(text)}' is no !!{kind}", node)
        try:
            return _READ[kind](text)
        except ValueError as error:
            raise _marked(str(error), node) from None

    def refuse_tag(self, node: yaml.Node) -> Any:
        """A tag of another type."""
        raise _marked(f"a recipe has no values of the type {brief(node.tag.replace(_TAG, '!!'))}", node)


class _Dumper(yaml.SafeDumper):
    """Puts in quotes what either version would read as something else than a text."""


_Loader.yaml_implicit_resolvers = {}
_Loader.yaml_constructors = {
    None: _Loader.refuse_tag,
    f"{_TAG}str": yaml.SafeLoader.construct_yaml_str,
    f"{_TAG}seq": yaml.SafeLoader.construct_yaml_seq,
    f"{_TAG}map": yaml.SafeLoader.construct_yaml_map,
}
for _kind, (_form, _begins) in _SCALARS.items():
    for _side in (_Loader, _Dumper):
        _side.add_implicit_resolver(_TAG + _kind, re.compile(rf"(?:{_form})\Z"), ["", *_begins])
    _Loader.add_constructor(_TAG + _kind, _Loader.read_scalar)


def _marked(problem: str, node: yaml.Node) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark)


def _in_words(error: yaml.YAMLError) -> str:
    """In one line, without the excerpt."""
    if not isinstance(error, yaml.MarkedYAMLError):
        return brief(" ".join(str(error).split()), 300)
    mark = error.problem_mark or error.context_mark
    place = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
    return place + brief(", ".join(filter(None, (error.problem, error.context))), 300)
