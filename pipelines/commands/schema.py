"""The recipe's JSON schema, for editors, and the reference of all its keys, for people. Both come from the sections."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from nvila.components.contracts.recipe.layers import EXTENDS
from nvila.components.contracts.recipe.recipe import Recipe

DRAFT = "https://json-schema.org/draft/2020-12/schema"
NULL = {"type": "null"}


def schema() -> dict[str, Any]:
    """What a recipe's file may say: every key may be left to what it extends, or taken away with null.

    What options say of each other is checked when the recipe is read, and not by the schema.
    """
    whole = Recipe.model_json_schema(by_alias=True)
    for section in (whole, *whole["$defs"].values()):
        if "properties" in section:
            section.pop("required", None)
            section["properties"] = {name: _in_a_layer(option) for name, option in section["properties"].items()}
    about = "A shipped recipe's name, or the path of a file from here, whose values this one changes."
    whole["properties"] = {EXTENDS: {"type": "string", "description": about}, **whole["properties"]}
    return {"$schema": DRAFT, **whole, "title": "NVILA recipe"}


def as_text() -> str:
    """The schema as JSON."""
    return json.dumps(schema(), indent=1)


def every_key() -> Iterator[tuple[str, str, str, str]]:
    """Each key: its dotted path (`*` is an entry of a list), what it may be, its default, what it is for."""
    whole = Recipe.model_json_schema(by_alias=True)
    yield from _keys(whole, whole["$defs"], "")


def _keys(section: dict[str, Any], defs: dict[str, Any], above: str) -> Iterator[tuple[str, str, str, str]]:
    for name, option in section["properties"].items():
        path = f"{above}{name}"
        below, listed = _section(option, defs)
        if below:
            yield from _keys(below, defs, f"{path}.*." if listed else f"{path}.")
        else:
            default = json.dumps(option["default"]) if "default" in option else ""
            yield path, _kind(option), "" if default == "null" else default, option.get("description", "")


def _section(option: dict[str, Any], defs: dict[str, Any]) -> tuple[dict[str, Any] | None, bool]:
    """The section that an option holds, if it holds one, and whether it is a list of them."""
    listed = option.get("type") == "array"
    inner = option["items"] if listed and "items" in option else option
    for one in (inner, *inner.get("anyOf", ())):
        if "$ref" in one:
            return defs[one["$ref"].rpartition("/")[2]], listed
    return None, False


def _in_a_layer(option: dict[str, Any]) -> dict[str, Any]:
    """An option as a file may have it."""
    kinds = option["anyOf"] if "anyOf" in option else [{k: v for k, v in option.items() if k not in _NOTES}]
    items = option.get("items", {})
    if any("$ref" in one for one in (items, *items.get("anyOf", ()))):
        entries = {"type": "object", "additionalProperties": {"anyOf": [items, NULL]}}
        kinds = [*kinds, entries]  # single entries by their names
    notes = {key: value for key, value in option.items() if key in _NOTES and value is not None}
    return {"anyOf": [*(kind for kind in kinds if kind != NULL), NULL], **notes}


_NOTES = ("default", "description", "title")


def _kind(option: dict[str, Any]) -> str:
    """In words: `integer, 1 to 64`."""
    if "anyOf" in option:
        return " or ".join(_kind(one) for one in option["anyOf"] if one != NULL)
    if "enum" in option or "const" in option:
        return ", ".join(f"`{value}`" for value in option.get("enum", [option.get("const")]))
    words = str(option.get("type", "any"))
    if words == "array":
        inner = option.get("items") or {}
        return f"list of {_kind(inner)}" if inner else f"list of {len(option.get('prefixItems', ()))} integers"
    if words == "object":
        by_pattern = [*option.get("patternProperties", {}).values()]
        return f"table of {_kind(by_pattern[0] if by_pattern else option['additionalProperties'])}"
    low, high = option.get("minimum"), option.get("maximum")
    if "exclusiveMinimum" in option:
        low = f"above {option['exclusiveMinimum']}"
    if "exclusiveMaximum" in option:
        high = f"below {option['exclusiveMaximum']}"
    return f"{words}, {low} to {high}" if low is not None and high is not None else words
