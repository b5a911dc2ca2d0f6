"""The values of the chart, read from its schema: the table in the chart's README."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

CHART = Path("charts/nvila-platform")
Schema = Mapping[str, Any]


def values_schema(chart: Path = CHART) -> dict[str, Any]:
    """`values.schema.json`."""
    found: dict[str, Any] = json.loads((chart / "values.schema.json").read_text(encoding="utf-8"))
    return found


def resolved(schema: Schema, root: Schema) -> Schema:
    """What a `$ref` leads to, with what stands beside it."""
    while "$ref" in schema:
        target: Any = root
        for part in schema["$ref"].removeprefix("#/").split("/"):
            target = target[part]
        schema = target | {key: value for key, value in schema.items() if key != "$ref"}
    return schema


def every_value(schema: Schema, root: Schema, where: str = "") -> Iterator[tuple[str, Schema]]:
    """Each key below, by its path: `.mlflow.mode`, and `.gpu.tolerations[].key` of a list's items."""
    schema = resolved(schema, root)
    yield where, schema
    for name, part in schema.get("properties", {}).items():
        yield from every_value(part, root, f"{where}.{name}")
    if isinstance(schema.get("items"), dict):
        yield from every_value(schema["items"], root, f"{where}[]")


def values_rows() -> Iterator[tuple[str, str, str]]:
    """Key, default and meaning of each value; of blocks of `pods` that take the same as `all` not every key again."""
    root, defaults = values_schema(), yaml.safe_load((CHART / "values.yaml").read_text(encoding="utf-8"))
    blocks = root["properties"]["pods"]["properties"]
    same = {name for name, block in blocks.items() if name != "all" and block.get("$ref") == blocks["all"]["$ref"]}
    for where, schema in every_value(root, root):
        keys = where.removeprefix(".").split(".")
        again = keys[0] == "pods" and len(keys) > 2 and (keys[1] in same or len(keys) > 3)
        if where == "" or "[]" in where or again:
            continue
        yield f"`{'.'.join(keys)}`", _default(defaults, keys), _about(schema)


def _default(values: Any, keys: list[str]) -> str:
    for key in keys:
        if not isinstance(values, dict) or key not in values:
            return ""
        values = values[key]
    whole = isinstance(values, dict) and bool(values)  # its parts stand below
    return "" if whole or values == "" else f"`{json.dumps(values)}`"


def _about(schema: Schema) -> str:
    choice = ", ".join(f"`{one}`" for one in schema.get("enum", ()))
    return schema["description"] + (f" One of {choice}." if choice else "")


def apis_rows() -> Iterator[tuple[str, str]]:
    """Part of the chart, and the API that it needs, as its checks have them; Kueue's later version does as well."""
    checks = (CHART / "templates/checks.yaml").read_text(encoding="utf-8")
    for part, api in re.findall(r'"part" "([^"]+)" "api" "([^"]+)"', checks):
        yield f"`{part}`", f"`{api}`"
