"""Content keys: the digest of everything a step's output depends on. Two runs with one key would do the same work."""

from __future__ import annotations

import ast
import importlib.util
import re
import sys
from collections.abc import Iterable, Mapping
from functools import cache
from importlib.metadata import PackageNotFoundError, packages_distributions, version
from pathlib import Path
from typing import Any

from nvila.components.contracts.manifest import digest_json, sha256_file

OURS = "nvila."
_OUR_MODULE = re.compile(r"nvila(\.[A-Za-z_]\w*)+")


def content_key(
    step_module: str,
    settings: Mapping[str, Any],
    inputs: Mapping[str, str],
    external: Mapping[str, Any] | None = None,
) -> str:
    """Key of one execution of a step: 64 hex characters.

    Args:
        step_module: dotted name of the module that holds the step's function.
        settings: the step's slice of the recipe, as JSON.
        inputs: digest of each input's manifest, by name.
        external: digests of what the step reads outside the store (the user's data files). Never times: a copy of the
            same bytes is the same.
    """
    modules = import_closure(step_module)
    return digest_json(
        {
            "step": step_module,
            "settings": settings,
            "inputs": inputs,
            "external": external or {},
            "code": {name: _file_digest(path) for name, path in modules.items()},
            "libraries": library_versions(modules.values()),
        }
    )


def import_closure(module: str) -> dict[str, str]:
    """Files of our own modules that `module` reaches by import, at any depth, late imports included: name -> path.

    Reads the source, executes nothing. A package's `__init__` counts for each module inside it, and so does a module
    that is named in a string: a process started with `-m nvila...`, or `import_module("nvila...")`.
    """
    found: dict[str, str] = {}
    queue = [module]
    while queue:
        name = queue.pop()
        if name in found:
            continue
        path = _source(name)
        if path is None:
            continue
        found[name] = path
        queue.extend(n for n in _imported(path) if n.startswith(OURS))
        parent = name.rpartition(".")[0]
        if parent.count(".") >= 1:
            queue.append(parent)
    return dict(sorted(found.items()))


def library_versions(paths: Iterable[str]) -> dict[str, str]:
    """Installed versions of the third-party distributions that the source files import."""
    tops = {name.partition(".")[0] for path in paths for name in _imported(path)}
    tops -= set(sys.stdlib_module_names) | {"nvila", "__future__"}
    owners = _owners()
    found = {}
    for top in tops:
        for distribution in owners.get(top, []):
            try:
                found[distribution] = version(distribution)
            except PackageNotFoundError:
                continue
    return dict(sorted(found.items()))


@cache
def _owners() -> Mapping[str, list[str]]:
    return packages_distributions()


@cache
def _source(module: str) -> str | None:
    """File of one of our modules; None where the name is something inside a module.

    Looked for by path: `find_spec` of the whole name would execute what stands above it, torch and all.
    """
    top, _, rest = module.removeprefix(OURS).partition(".")
    spec = importlib.util.find_spec(OURS + top)
    for folder in (spec.submodule_search_locations if spec else None) or ():
        path = Path(folder, *rest.split("."))
        for file in (path / "__init__.py", path.with_name(path.name + ".py")):
            if file.is_file():
                return str(file)
    return None


@cache
def _file_digest(path: str) -> str:
    return sha256_file(path)


@cache
def _imported(path: str) -> tuple[str, ...]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(Path(path).read_bytes(), filename=path)):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module)
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and _OUR_MODULE.fullmatch(node.value):
            names.add(node.value)
    return tuple(sorted(names))
