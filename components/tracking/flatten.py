"""Nested settings and results as the flat names and values that MLflow takes."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

from nvila.components.contracts.results.result import Result
from nvila.components.tracking.columns import VALUE, fitted, key
from nvila.components.tracking.redact import redact

T = TypeVar("T")


def parameters(settings: Mapping[str, Any]) -> dict[str, str]:
    """Leaves of `settings` by dotted key, secrets redacted, as columns take them."""
    found: dict[str, str] = {}
    for name, value in _walk(redact(settings), "."):
        found[key(name, found)] = fitted(value if isinstance(value, str) else json.dumps(value, default=str), VALUE)
    return found


def metrics(values: Result | Mapping[str, Any]) -> dict[str, float]:
    """Numbers in `values` by `/`-joined key (MLflow groups charts by it). Booleans and lists are not metrics.

    A measured value goes by the name of its metric, beside its `low`, `high` and `n`.
    """
    found: dict[str, float] = {}
    for name, value in _walk(values.model_dump() if isinstance(values, Result) else values, "/"):
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            found[key(name, found)] = float(value)
    return found


def batches(items: list[T], size: int) -> Iterator[list[T]]:
    """Consecutive parts of `items`, `size` long at most."""
    return (items[start : start + size] for start in range(0, len(items), size))


def _walk(values: Any, separator: str, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Leaves with their joined keys; a list of mappings goes by index, any other list is one leaf."""
    if isinstance(values, Mapping):
        metric = {"value": str(values["metric"])} if "metric" in values else {}
        items = [(metric.get(name, str(name)), value) for name, value in values.items()]
    elif isinstance(values, list) and values and all(isinstance(item, Mapping) for item in values):
        items = [(str(index), value) for index, value in enumerate(values)]
    else:
        yield prefix, values
        return
    for name, value in items:
        yield from _walk(value, separator, f"{prefix}{separator}{name}" if prefix else name)
