"""The single checks of preflight. Each returns the problems it found, one line each; none of them writes anything."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import MappingProxyType

from nvila.components.contracts.errors import DataError, NvilaError, Unreachable
from nvila.components.contracts.memory import available_bytes, gib
from nvila.components.contracts.places import is_version, standing
from nvila.components.contracts.recipe.data import LABELS, SPLITS, SUFFIXES, Source
from nvila.components.data.layouts import read
from nvila.components.preflight.enough import Held
from nvila.components.tracking import connect
from nvila.components.tracking.checkpoints import identity

LOCK = Path(__file__).parents[2] / "requirements" / "main.lock"
"""Lies in the checkout; an image is built from it and does not carry it."""


class Away(str):
    """A problem that may pass: a service does not answer."""


def python_problems() -> list[str]:
    """The interpreter is new enough."""
    found = sys.version_info[:2]
    return [] if found >= (3, 11) else [f"Python 3.11 or newer is needed, this is {found[0]}.{found[1]}"]


def memory_problems(needed_bytes: int) -> list[str]:
    """Enough memory is available now."""
    available = available_bytes()
    if available >= needed_bytes:
        return []
    return [f"needs.memory_bytes: {gib(needed_bytes)} of memory are needed, {gib(available)} are available"]


def disk_problems(needed_bytes: int, folders: Iterable[Path]) -> list[str]:
    """Each folder can be written, and its disk has room."""
    problems = []
    for there in dict.fromkeys(map(standing, folders)):
        free = shutil.disk_usage(there).free
        if not _writable(there):
            problems.append(f"{there} cannot be written")
        elif free < needed_bytes:
            problems.append(f"needs.disk_bytes: {gib(needed_bytes)} are needed at {there}, {gib(free)} are free")
    return problems


def package_problems(lock: Path = LOCK) -> list[str]:
    """Installed versions are those of the lock file; a local label such as `+cpu` does not count."""
    if not lock.is_file():
        return []
    wrong = []
    for line in lock.read_text(encoding="utf-8").splitlines():
        name, _, pinned = line.partition("#")[0].strip().partition("==")
        if not pinned:
            continue
        try:
            installed = version(name).partition("+")[0]
        except PackageNotFoundError:
            wrong.append(f"{name}=={pinned} is missing")
            continue
        if installed != pinned:
            wrong.append(f"{name} is {installed}, the lock says {pinned}")
    if not wrong:
        return []
    more = f" and {len(wrong) - 4} more" if len(wrong) > 4 else ""
    return [f"packages differ from {lock.name}: {', '.join(wrong[:4])}{more}; `make env` installs the lock"]


def data_problems(
    sources: Iterable[Source],
    drawn: Mapping[str, Mapping[str, Sequence[str]]] = MappingProxyType({}),
    *,
    demo_can_be_built: bool = False,
    held: dict[str, Held] | None = None,
) -> list[str]:
    """Annotation files are there and hold records.

    Args:
        sources: the recipe's sources.
        drawn: what draws samples, by source and split: those files must be there.
        demo_can_be_built: a demonstration source that is not there yet is no problem.
        held: gets what each readable file holds, by `source.split`.
    """
    problems: list[str] = []
    held = {} if held is None else held
    for source in sources:
        folder = Path(source.path)
        if not folder.is_dir():
            if not (source.demo and demo_can_be_built):
                problems.append(f"data source {source.name}: no such folder {source.path}")
            continue
        if source.demo and demo_can_be_built:
            continue
        there, asked = source.annotations(), drawn.get(source.name, {})
        problems += [
            f"data source {source.name}: {_either(source, split)} is missing, from which {_several(asked[split])} draws"
            for split in asked
            if split not in there
        ]
        if not there and not asked:
            problems.append(f"data source {source.name}: no {', '.join(SPLITS)} or {LABELS} file in {folder}")
        for name, path in there.items():
            try:
                records = read(path, source.layout_of(name))
            except DataError as error:
                problems.append(str(error))
                continue
            held[f"{source.name}.{name}"] = Held.of(records)
            if not records:
                problems.append(f"{path}: must hold at least one record")
    return problems


def _either(source: Source, split: str) -> str:
    _, *others = SUFFIXES[source.layout]
    return f"{source.annotation(split)}" + "".join(f" (or {split}{suffix})" for suffix in others)


def _several(names: Sequence[str]) -> str:
    return " and ".join(filter(None, (", ".join(names[:-1]), names[-1])))


def weights_problems(weights: Iterable[str], runs: Path) -> list[str]:
    """Weights are there and may be read. Asks stores, the hub and the registry what they have; nothing is fetched.

    Args:
        weights: folders, addresses, and versions of the registry.
        runs: folder of all runs, with the local registry.

    Raises:
        Unreachable: one of them does not answer, which is no fault of the recipe.
    """
    problems = []
    for uri in dict.fromkeys(weights):
        try:
            if "://" in uri or is_version(uri):
                identity(uri, runs)
            elif not Path(uri).is_dir():
                problems.append(f"{uri}: no such folder of weights")
        except Unreachable:
            raise
        except NvilaError as error:
            problems.append(str(error))
    return problems


def tracking_problems(runs: Path) -> list[str]:
    """MLflow answers, lets us in, and can be used: every step is recorded there, and the model is registered.

    Args:
        runs: folder of all runs, with the local store.
    """
    try:
        if connect.has_store(runs):
            connect.check(runs)
    except Unreachable as error:
        return [Away(error)]
    except NvilaError as error:
        return [str(error)]
    return []


def _writable(folder: Path) -> bool:
    return folder.is_dir() and os.access(folder, os.W_OK | os.X_OK)
