"""Values of the chart drawn at random from its schema, and what Kubernetes says of what comes out."""

from __future__ import annotations

import json
import random
import re
import string
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from helming import APIS, CHART, template
from jsonschema import Draft202012Validator
from schemas import VERSIONS, custom, custom_faults, faults

from nvila.pipelines.show.chart import resolved, values_schema

Schema = Mapping[str, Any]
TRIES = 2000
PRINTABLE = string.ascii_letters + string.digits + string.punctuation + " "
_parse: Any = re._parser.parse  # type: ignore[attr-defined]


class Drawn:
    """Values of a schema; the same seed draws the same ones."""

    def __init__(self, schema: Schema, seed: int) -> None:
        self.root, self.random = schema, random.Random(seed)

    def values(self) -> dict[str, Any]:
        """A set that the whole schema takes."""
        found: dict[str, Any] = self.fitting(self.root)
        return found

    def fitting(self, schema: Schema) -> Any:
        """A value that fits; conditions (`if`, `not`, `oneOf` of an object) are met by drawing again."""
        check = Draft202012Validator({**resolved(schema, self.root), "$defs": self.root["$defs"]})
        for _ in range(TRIES):
            if check.is_valid(value := self.any_of(resolved(schema, self.root))):
                return value
        raise AssertionError(f"nothing drawn fits: {schema}")

    def any_of(self, schema: Schema) -> Any:
        """By the kind of schema."""
        pick = self.random
        if "enum" in schema:
            return pick.choice(schema["enum"])
        if "oneOf" in schema and "properties" not in schema:
            return self.fitting(pick.choice(schema["oneOf"]))
        kind = schema.get("type", "string")
        if isinstance(kind, list):
            kind = pick.choice(kind)
        if kind == "boolean":
            return pick.random() < 0.5
        if kind in ("integer", "number"):
            low, high = schema.get("minimum", 0), schema.get("maximum", 10**6)
            return pick.choice((low, high, pick.randint(low, high)))
        if kind == "array":
            least = schema.get("minItems", 0)
            most = min(schema.get("maxItems", 3), least + 3)
            return [self.fitting(schema["items"]) for _ in range(pick.randint(least, most))]
        return self.object(schema) if kind == "object" else self.text(schema)

    def object(self, schema: Schema) -> dict[str, Any]:
        """Required keys, some of the others, and a few of free ones."""
        pick, required = self.random, schema.get("required", ())
        known: Mapping[str, Any] = schema.get("properties", {})
        found = {key: self.fitting(part) for key, part in known.items() if key in required or pick.random() < 0.3}
        free: Any = schema.get("additionalProperties")
        names: Any = schema.get("propertyNames", {})
        for pattern, part in schema.get("patternProperties", {}).items():
            names, free = {"pattern": pattern}, part
        if isinstance(free, dict) and free:
            least = schema.get("minProperties", 0)
            for _ in range(pick.randint(least, least + 2)):
                found[self.fitting(names)] = self.fitting(free)
        return found

    def text(self, schema: Schema) -> str:
        """Of its pattern; anything that can be printed without one."""
        if pattern := schema.get("pattern"):
            return "".join(self._of(_parse(pattern)))
        return "".join(self.random.choices(PRINTABLE, k=self.random.randint(0, 12)))

    def _of(self, parsed: Any) -> Iterator[str]:
        """Characters of a parsed pattern."""
        for operation, value in parsed:
            match str(operation):
                case "LITERAL":
                    yield chr(value)
                case "NOT_LITERAL":
                    yield self._one_of([("NEGATE", None), ("LITERAL", value)])
                case "IN":
                    yield self._one_of(value)
                case "MAX_REPEAT":
                    least, most, part = value
                    for _ in range(self.random.randint(least, min(int(most), least + self.random.choice((1, 3, 9))))):
                        yield from self._of(part)
                case "SUBPATTERN":
                    yield from self._of(value[3])
                case "BRANCH":
                    yield from self._of(self.random.choice(value[1]))
                case "AT":
                    pass
                case other:
                    raise AssertionError(f"a pattern of the schema has {other}")

    def _one_of(self, choices: Any) -> str:
        pattern = re.compile("[" + "".join(_in_brackets(one) for one in choices) + "]")
        return self.random.choice([one for one in PRINTABLE if pattern.fullmatch(one)])


def _in_brackets(choice: Any) -> str:
    operation, value = choice
    match str(operation):
        case "NEGATE":
            return "^"
        case "RANGE":
            return f"{re.escape(chr(value[0]))}-{re.escape(chr(value[1]))}"
        case "CATEGORY":
            return {"CATEGORY_SPACE": r"\s", "CATEGORY_NOT_SPACE": r"\S"}[str(value)]
        case _:
            return re.escape(chr(value))


def draw(seed: int) -> dict[str, Any]:
    """A set of values that the schema takes."""
    return Drawn(values_schema(CHART), seed).values()


class Refused(Exception):
    """The chart's own checks name what does not go together."""


def fault(values: Mapping[str, Any]) -> str | None:
    """What is wrong with what the chart makes of these values, on a cluster that has every API.

    Each document is held against the schemas of each version, strictly, and custom resources against their definitions.
    Objects of `extraObjects` are the site's own: they come out as they went in.

    Raises:
        Refused: nothing was made of them.
    """
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "values.yaml")
        file.write_text(json.dumps(values), encoding="utf-8")
        ran = template(file, apis=(*APIS, "nvila.io/v1alpha1/ModelRollout"))
    if ran.returncode != 0:
        if f"error at ({CHART.name}/templates/checks.yaml" in ran.stderr:
            raise Refused(ran.stderr)
        return ran.stderr
    documents = [document for document in yaml.load_all(ran.stdout, yaml.CSafeLoader) if document]
    extra = values["extraObjects"]
    if lost := [one for one in extra if one not in documents]:
        return f"an object of extraObjects was changed: {lost}"
    for document in (one for one in documents if one not in extra):
        every = custom_faults(document) if custom(document) else _of_kubernetes(document)
        if found := next(every, None):
            return f"{document['kind']}/{document['metadata']['name']}: {found}"
    return None


def _of_kubernetes(document: Mapping[str, Any]) -> Iterator[str]:
    for version in VERSIONS:
        yield from faults(document, version)
