"""The CustomResourceDefinition of `ModelRollout`, out of its classes (`contracts/modelrollout.py`).

`python -m nvila.infra.controller.crd` writes it into the chart. The API server refuses what lies out of a field's
bounds. It leaves out keys that it does not know, which `kubectl` refuses; what options say of each other, and the names
in tables, only the classes check. Defaults stand in descriptions alone, so that what is stored is what people wrote.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from nvila.components.contracts import modelrollout as ours

PATH = Path(__file__).parents[2] / "charts" / "nvila-platform" / "files" / "modelrollout.yaml"
COLUMNS = (
    # name, type, path; the last ones only with `--output wide`
    ("Phase", "string", ".status.phase"),
    ("Champion", "string", ".status.champion.version"),
    ("Challenger", "string", ".status.challenger.version"),
    ("Step", "integer", ".status.step"),
    ("Of", "integer", ".status.steps"),
    ("Weight", "integer", ".status.weight"),
    ("Age", "date", ".metadata.creationTimestamp"),
    ("Message", "string", ".status.message"),
    ("Model", "string", ".spec.model"),
    ("Paused", "boolean", ".spec.paused"),
)
"""What `kubectl get mro` shows."""
WIDE = ("Model", "Paused")
KEPT = {
    "type", "description", "required", "enum", "pattern", "format", "minLength", "maxLength", "minimum", "maximum",
    "minItems", "maxItems", "minProperties", "maxProperties",
}  # fmt: skip
"""What a structural schema says in the same words as pydantic."""
LEFT_OUT = {"title", "default", "properties", "items", "additionalProperties", "patternProperties", "propertyNames"}
"""What it says in others, or cannot say."""


def definition() -> dict[str, Any]:
    """As the API server takes it."""
    schema = {
        "type": "object",
        "description": "A served model: what people decide of it, and what is.",
        "required": ["spec"],
        "properties": {
            "apiVersion": {"type": "string"},
            "kind": {"type": "string"},
            "metadata": {"type": "object"},
            "spec": of_type(ours.Spec),
            "status": of_type(ours.Status),
        },
    }
    columns = [
        {"name": name, "type": kind, "jsonPath": path, **({"priority": 1} if name in WIDE else {})}
        for name, kind, path in COLUMNS
    ]
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": f"{ours.PLURAL}.{ours.GROUP}"},
        "spec": {
            "group": ours.GROUP,
            "scope": "Namespaced",
            "names": {
                "kind": ours.KIND,
                "listKind": f"{ours.KIND}List",
                "plural": ours.PLURAL,
                "singular": ours.SINGULAR,
                "shortNames": [ours.SHORT],
                "categories": ["nvila"],
            },
            "versions": [
                {
                    "name": ours.VERSION,
                    "served": True,
                    "storage": True,
                    "subresources": {"status": {}},
                    "additionalPrinterColumns": columns,
                    "schema": {"openAPIV3Schema": schema},
                }
            ],
        },
    }


def of_type(kind: type[BaseModel]) -> dict[str, Any]:
    """The structural schema of a class."""
    schema = kind.model_json_schema(by_alias=True)
    return _structural(schema, schema.get("$defs", {}))


def _structural(node: Mapping[str, Any], named: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """A part of pydantic's schema, with what it refers to put in its place."""
    node = {key: value for key, value in node.items() if key != "$defs"}
    if reference := node.pop("$ref", ""):
        return _structural({**named[reference.rpartition("/")[2]], **node}, named)
    if options := node.pop("anyOf", None):
        (option,) = [option for option in options if option != {"type": "null"}]
        return _structural({**option, **node}, named) | {"nullable": True}
    if "const" in node:
        node["enum"] = [node.pop("const")]
    assert node.keys() <= KEPT | LEFT_OUT, f"no word for {sorted(node.keys() - KEPT - LEFT_OUT)}"
    found = {key: value for key, value in node.items() if key in KEPT}
    if said := _description(node):
        found["description"] = said
    if properties := node.get("properties"):
        found["properties"] = {name: _structural(part, named) for name, part in properties.items()}
    elif node["type"] == "array":
        found["items"] = _structural(node["items"], named)
    elif node["type"] == "object":
        found |= _table(node, named)
    return found


def _table(node: Mapping[str, Any], named: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Of an object whose keys people choose; Kubernetes' own objects are left to Kubernetes."""
    values = [*node.get("patternProperties", {}).values()] or [node["additionalProperties"]]
    if values == [True]:
        return {"x-kubernetes-preserve-unknown-fields": True}
    (value,) = values
    return {"additionalProperties": _structural(value, named)}


def _description(node: Mapping[str, Any]) -> str:
    """In a line, with the default that the classes put in."""
    said = " ".join(node.get("description", "").split())
    default = node.get("default")
    if default in (None, "", [], {}) or isinstance(default, dict):
        return said
    return f"{said} Default: {json.dumps(default)}.".strip()


def written() -> str:
    """The file of the chart."""
    import yaml

    head = "# Written by `python -m nvila.infra.controller.crd` out of components/contracts/modelrollout.py.\n"
    return head + yaml.safe_dump(definition(), sort_keys=False, width=120, allow_unicode=True)


if __name__ == "__main__":
    PATH.write_text(written(), encoding="utf-8")
