"""What of a store nothing needs any more, and its removal, beside runs that are going on.

Needed is what was used within so many days, and where something begins (versions that are kept, what is served on this
machine, runs that are going on), with all that it was made from. Whoever does work or finds it done holds its lock, so
that the lock's time is that of the last use; who removes the work holds it too, and asks for that time again.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from nvila.components.contracts.errors import ConfigError, DamagedError, NvilaError
from nvila.components.contracts.locks import at_once, is_held, lacking
from nvila.components.contracts.manifest import MANIFEST, InputRef, Manifest
from nvila.components.contracts.results.run import Resolution
from nvila.components.contracts.steps import PREFLIGHT, RESOLVE
from nvila.components.contracts.store import Store
from nvila.components.runner.status import Status, StepStatus, statuses

DAY_SECONDS = 86400.0


@dataclass(frozen=True)
class Work:
    """A folder of the store."""

    step: str
    key: str
    """As far as it names the folder."""
    size_bytes: int
    used: float
    """When it was last looked at, in seconds since the epoch."""


def going_on(runs: Path, store: Store) -> list[Path]:
    """Runs with a step that runs (it said so, and some work of that step is locked), or of which one has said something
    within a day: between two steps nothing is locked."""
    found = []
    for folder in sorted(path.parent for path in runs.glob("*/steps")):
        told = max((path.stat().st_mtime for path in (folder / "steps").glob("*.json")), default=0.0)
        running = [step.name for step in statuses(folder) if step.status is Status.RUNNING]
        locks = (lock for step in running for lock in (store.root / step).glob(".*.lock"))
        if time.time() - told < DAY_SECONDS or any(map(is_held, locks)):
            found.append(folder)
    return found


def read_by(run: Path) -> list[str]:
    """What a run's recipe takes weights from: folders, addresses and versions."""
    resolved = StepStatus.read(run, RESOLVE).manifest
    slices = Manifest.load(resolved).told(Resolution).slices if resolved else {}
    preflight = slices.get(PREFLIGHT) or {}
    return [*preflight.get("weights", []), *filter(None, [preflight.get("start")])]


def needed(store: Store, begin: Iterable[Path]) -> set[Path]:
    """The folders of the store from which something begins, and those that they were made from.

    Raises:
        DamagedError: a manifest on the way cannot be read, so that nobody knows what lies behind it.
    """
    found: set[Path] = set()
    left = [place for path in begin if (place := _within(store, path))]
    while left:
        place = left.pop()
        if place in found or not place.is_dir():
            continue
        found.add(place)
        if (place / MANIFEST).is_file():
            try:
                inputs = Manifest.load(place / MANIFEST).inputs
            except NvilaError as error:
                raise DamagedError(
                    f"it is needed, and what it was made from cannot be read: {error}",
                    where=str(place),
                    do="Run its recipe again, which mends it; nothing was removed.",
                ) from error
            left += [named(store, ref) for ref in inputs.values()]
    return found


def named(store: Store, ref: InputRef) -> Path:
    """The folder of a manifest that another one or a version names: in this store, wherever it lay when that was
    written."""
    return store.folder(ref.step, Path(ref.uri).parent.name)


def unneeded(store: Store, kept: set[Path], days: float) -> Iterator[Work]:
    """Work that is not kept, was not used for so many days, and is not at work."""
    before = time.time() - days * DAY_SECONDS
    for lock in sorted(store.root.glob("*/.*.lock")):
        step, key = lock.parent.name, lock.name.removeprefix(".").removesuffix(".lock")
        folder = store.folder(step, key)
        if folder.is_symlink() or not folder.is_dir() or folder in kept:
            continue
        used = lock.stat().st_mtime
        if used < before and not is_held(lock):
            yield Work(step, key, _bytes(folder), used)


def remove(store: Store, work: Work) -> bool:
    """Remove it, unless somebody has used it meanwhile or does now. Its lock stays: others may wait at it.

    Ended in between, it leaves damaged work, which a run does again and the next time removes.
    """
    lock = store.lock(work.step, work.key)
    with at_once(lock) as free:
        if not free or lock.stat().st_mtime > work.used:
            return False
        store.remove(work.step, work.key)
        return True


def refuse_without_locks(store: Store) -> None:
    """Raises:
    ConfigError: nobody can tell what is at work there.
    """
    if lacking(store.root):
        raise ConfigError(
            "this file system has no locks, so nobody can tell what is at work",
            where=str(store.root),
            do="Remove the folders of finished runs by hand, while nothing runs.",
        )


def _within(store: Store, path: Path) -> Path | None:
    """The work's folder that a path lies in."""
    try:
        parts = path.absolute().relative_to(store.root).parts
    except ValueError:
        return None
    return store.root.joinpath(*parts[:2]) if len(parts) > 1 else None


def _bytes(folder: Path) -> int:
    files = (Path(place, name) for place, _, names in os.walk(folder) for name in names)
    return sum(file.lstat().st_size for file in files)
