"""Content keys: the digest of everything a step's output depends on. Two runs with one key would do the same work."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterable, Mapping
from functools import cache
from importlib.metadata import PackageNotFoundError, packages_distributions, version
from pathlib import Path
from pkgutil import iter_modules
from typing import Any

from nvila.components.contracts.manifest import digest_json, sha256_file
from nvila.components.contracts.neutral import NEUTRAL
from nvila.components.contracts.syntax import Syntax, read_syntax

OURS = "nvila."


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
            "code": {name: file_digest(path) for name, path in (modules | data_files(modules)).items()},
            "libraries": library_versions(modules.values()),
        }
    )


def import_closure(module: str) -> dict[str, str]:
    """Files of our own modules that `module` reaches by import, at any depth, late imports included: name -> path.

    Reads the source, executes nothing. A package's `__init__` counts for each module inside it, and so does a module
    that is named in a string: a process started with `-m nvila...`, or `import_module("nvila...")`. Of a name
    that is put together the whole package counts. Without the modules of `NEUTRAL`.
    """
    found: dict[str, str] = {}
    queue = [module]
    while queue:
        name = queue.pop()
        if name in found or name in NEUTRAL:
            continue
        if name.endswith(".*") and (folder := (_source(name[:-2]) or "").removesuffix("/__init__.py")):
            queue.extend(name[:-1] + module.name for module in iter_modules([folder]))
        path = _source(name)
        if path is None:
            continue
        found[name] = path
        parent = name.rpartition(".")[0]
        package = name if path.endswith("/__init__.py") else parent
        named = (importlib.util.resolve_name(n, package) for n in _syntax(path).imported)
        queue.extend(n for n in named if n.startswith(OURS))
        if parent.count(".") >= 1:
            queue.append(parent)
    return dict(sorted(found.items()))


def data_files(modules: Mapping[str, str]) -> dict[str, str]:
    """Files that are no Python in the folders of those modules that are packages: templates, styles, recipes."""
    return {
        f"{name}/{file.name}": str(file)
        for name, path in modules.items()
        if path.endswith("/__init__.py")
        for file in sorted(Path(path).parent.iterdir())
        if file.is_file() and not file.name.startswith(".") and file.suffix not in (".py", ".pyc")
    }


def library_versions(paths: Iterable[str]) -> dict[str, str]:
    """Installed versions of the third-party distributions that the source files import."""
    tops = {name.partition(".")[0] for path in paths for name in _syntax(path).imported}
    tops -= set(sys.stdlib_module_names) | {"nvila", "__future__", ""}
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


def file_digest(path: str) -> str:
    """Of what a Python file does (`syntax`), of the bytes of any other."""
    return _syntax(path).sha256 if path.endswith(".py") else sha256_file(path)


@cache
def _syntax(path: str) -> Syntax:
    return read_syntax(Path(path).read_bytes(), path)
