"""The CustomResourceDefinition: that the chart has the one of the classes, and that the two refuse the same."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator
from typing import Any

import pytest
import yaml
from jsonschema import Draft202012Validator
from pydantic import ValidationError

from nvila.components.contracts.modelrollout import Spec, Status, dump
from nvila.infra.controller.crd import COLUMNS, PATH, definition, of_type, written

SPEC: dict[str, Any] = {"model": "nvila-tiny", "image": "registry.example/serve:1", "gateway": {"name": "public"}}
LEAST: dict[str, Any] = {"override": {"version": "7", "reason": "the eighth reads no plates"}}
"""What a part has to have beside the field that a test puts in."""


def test_the_chart_has_the_definition_of_the_classes() -> None:
    """A field that the stored definition lacks is dropped by the API server without a word."""
    if os.environ.get("UPDATE_GOLDEN"):
        PATH.write_text(written(), encoding="utf-8")
    assert PATH.read_text(encoding="utf-8") == written(), "python -m nvila.infra.controller.crd"
    assert yaml.safe_load(written()) == definition()


def _nodes(schema: dict[str, Any], where: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    yield where, schema
    for name, part in schema.get("properties", {}).items():
        yield from _nodes(part, f"{where}.{name}")
    for key in ("items", "additionalProperties"):
        if isinstance(schema.get(key), dict):
            yield from _nodes(schema[key], f"{where}[]")


def test_the_schema_is_structural() -> None:
    """A newer API server refuses a definition with `$ref`, with a part without a type, or with closed objects."""
    (version,) = definition()["spec"]["versions"]
    nodes = dict(_nodes(version["schema"]["openAPIV3Schema"]))
    assert len(nodes) > 150
    unknown = {"$ref", "$defs", "anyOf", "oneOf", "allOf", "const", "title", "default", "patternProperties"}
    assert {where: node for where, node in nodes.items() if unknown & node.keys() or "type" not in node} == {}
    assert [where for where, node in nodes.items() if node.get("additionalProperties") is False] == []
    both = [where for where, node in nodes.items() if {"properties", "additionalProperties"} <= node.keys()]
    assert both == []
    exclusive = [n.get("exclusiveMinimum", False) for n in nodes.values()]
    assert all(isinstance(value, bool) for value in exclusive)
    kept = {where for where, node in nodes.items() if node.get("x-kubernetes-preserve-unknown-fields")}
    assert kept == {".spec.pods.tolerations[]", ".spec.pods.affinity"}


def test_every_option_is_explained() -> None:
    """`kubectl explain mro.spec` is the reference that people at a cluster have."""
    silent = [
        where
        for where, node in _nodes(of_type(Spec))
        if not where.endswith("[]") and len(node.get("description", "")) < 4
    ]
    assert silent == [".override.version"]
    policy = of_type(Spec)["properties"]["policy"]["properties"]
    assert policy["steps"]["description"].endswith("Default: [5, 25, 50, 100].")


def test_columns_name_fields_that_exist() -> None:
    """A column of a field that is not there stays empty for ever."""
    (version,) = definition()["spec"]["versions"]
    nodes = dict(_nodes(version["schema"]["openAPIV3Schema"]))
    for name, kind, path in COLUMNS:
        if path.startswith(".metadata"):
            continue
        assert nodes[path]["type"] == kind, name


def _broken(node: dict[str, Any]) -> Iterator[Any]:
    """A value beyond each bound."""
    kind = node["type"]
    if "maximum" in node:
        yield node["maximum"] + 1
    if "minimum" in node:
        yield node["minimum"] - 1
    if "maxLength" in node:
        yield "a" * (node["maxLength"] + 1)
    if node.get("minLength"):
        yield ""
    if "pattern" in node:
        yield "/ /"
    if "maxItems" in node:
        yield [_sound(node["items"])] * (node["maxItems"] + 1)
    if "maxProperties" in node:
        yield {f"a{n}": "b" for n in range(node["maxProperties"] + 1)}
    wrong: dict[str, Any] = {"string": 7, "integer": "7", "number": "7", "boolean": "true", "array": {}, "object": []}
    yield wrong[kind]
    if not node.get("nullable"):
        yield None


def _sound(node: dict[str, Any]) -> Any:
    return {"string": "a", "integer": node.get("minimum", 0), "object": {}}[node["type"]]


def _put(where: str, value: Any) -> dict[str, Any]:
    """A spec with this value there, its neighbours as they must be."""
    spec: Any = copy.deepcopy(SPEC)
    place, *path = spec, *where.removeprefix(".").split(".")
    for name in path[:-1]:
        place = place.setdefault(name, copy.deepcopy(LEAST.get(name, {})))
    if path[-1].endswith("[]"):
        plain = path[-1].removesuffix("[]")
        value = {"key": value} if plain in ("nodeSelector", "adapters") else [value]
        place[plain] = value
    else:
        place[path[-1]] = value
    return dict(spec)


def test_what_the_server_refuses_the_controller_refuses_too_and_the_other_way_round() -> None:
    """A spec that the API server stores and the controller cannot read stops a model's rollouts later, at night."""
    schema = of_type(Spec)
    server = Draft202012Validator(_json_schema(schema))
    assert server.is_valid(SPEC) and Spec.model_validate(SPEC)
    tried = 0
    for where, node in _nodes(schema):
        for value in _broken(node) if where else ():
            spec = _put(where, value)
            assert not server.is_valid(spec), (where, value)
            with pytest.raises(ValidationError):
                Spec.model_validate(spec)
            tried += 1
    assert tried > 200
    for missing in SPEC:
        assert not server.is_valid({key: value for key, value in SPEC.items() if key != missing})


def _json_schema(node: Any) -> Any:
    """With Kubernetes' own word for null as JSON Schema has it."""
    if isinstance(node, list):
        return [_json_schema(item) for item in node]
    if not isinstance(node, dict):
        return node
    found = {key: _json_schema(value) for key, value in node.items()}
    if found.pop("nullable", False) is True:
        found["type"] = [found["type"], "null"]
    return found


@pytest.mark.parametrize(
    "where",
    [
        ("policy", {"steps": [50, 25]}),
        ("policy", {"pinnedPrompts": 65}),
        ("endpoint", {"certificate": "/tls.crt", "certificateKey": "/tls.key"}),
        ("endpoint", {"mediaFolders": ["/data"]}),
        ("endpoint", {"mediaDomains": ["127.0.0.1"]}),
        ("pods", {"replica": 2}),
    ],
)
def test_what_only_the_classes_see(where: tuple[str, Any]) -> None:
    """These are stored, so the controller has to say them; `crd.py` says that it is so."""
    name, value = where
    spec = {**SPEC, name: value}
    assert Draft202012Validator(_json_schema(of_type(Spec))).is_valid(spec)
    with pytest.raises(ValidationError):
        Spec.model_validate(spec)


def test_what_the_controller_writes_fits() -> None:
    """The API server refuses a status of another form: the controller would decide the same thing for ever."""
    time = "2026-11-28T12:00:00Z"
    served = {"version": "7", "digest": "d", "since": time}
    counted = {"requests": 3, "tokens": 4, "tokenSeconds": 0.5}
    status = Status.model_validate(
        {
            "phase": "Shifting",
            "champion": served,
            "challenger": {**served, "stepSince": time, "seen": {"total": counted, "last": {"pod-1": counted}}},
            "overridden": {"version": "6", "reason": "why"},
            "pending": [{"alias": "challenger", "version": "7"}, {"tag": "nvila.rollout", "text": "no"}],
            "decisions": [{"at": time, "verdict": "rolled back", "version": "7", "counted": counted}],
            "conditions": [{"type": "Ready", "status": "True", "reason": "Serving", "lastTransitionTime": time}],
        }
    )
    schema = _json_schema(of_type(Status))
    for value in (Status(), status):
        Draft202012Validator(schema).validate(dump(value))
    assert not Draft202012Validator(schema).is_valid({"phase": "Sleeping"})
    assert not Draft202012Validator(schema).is_valid({"champion": {"version": "7"}})
