"""What nothing needs any more, of a store and its registry together, and how it is removed and told: `nvila gc`'s work.

One rule for both: what was used or changed within so many days stays, and so does what an alias names, a ModelRollout
uses, is served on this machine, or is read by a run that is going on, with all that it was made from.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nvila.components.contracts.environment import Environment
from nvila.components.contracts.memory import gib
from nvila.components.contracts.store import Store
from nvila.components.kube.errors import NotServed
from nvila.components.kube.rollouts import ModelRollout, Rollouts
from nvila.components.runner.status import statuses
from nvila.components.serve import deployment
from nvila.components.tracking.connect import is_shared
from nvila.components.tracking.registry import Version, registered_inputs
from nvila.components.tracking.retired import ours, registered_versions, retire
from nvila.pipelines.commands.unneeded import (
    DAY_SECONDS,
    Work,
    going_on,
    named,
    needed,
    read_by,
    refuse_without_locks,
    remove,
    unneeded,
)
from nvila.pipelines.planning.checks import configured


@dataclass(frozen=True)
class Found:
    """What nothing needs."""

    versions: tuple[Version, ...]
    work: tuple[Work, ...]
    notes: tuple[str, ...] = ()
    """What was left out, and why."""


def find(store: Store, runs: Path, days: float, here: Environment, namespaces: Sequence[str | None]) -> Found:
    """What nothing needs; nothing is changed.

    Raises:
        ConfigError: the store's file system has no locks.
        DamagedError: what something that is needed was made from cannot be told.
        Unreachable, ApiError: the registry or the cluster does not answer, so nobody knows what they need.
    """
    if store.root.is_dir():
        refuse_without_locks(store)
    live = going_on(runs, store)
    read = [word for run in live for word in read_by(run)]
    wanted = deployment.read(runs, deployment.Wanted)
    served = [one for one in (wanted.champion, wanted.challenger, wanted.replaced) if one] if wanted else []
    used = {(one.name, one.version) for one in served}
    rollouts, notes = _rollouts(here, namespaces), []
    if rollouts is not None:
        used |= {pair for one in rollouts for pair in _used(one)}
    before = time.time() - days * DAY_SECONDS
    kept: list[Version] = []
    old: list[Version] = []
    for version, changed in registered_versions(runs):
        forms = {version.uri.removeprefix("models:/"), *(f"{version.name}@{alias}" for alias in version.aliases)}
        needs = version.aliases or changed > before or (version.name, version.version) in used or forms & {*read}
        (kept if needs else old).append(version)
    mine = ours(runs, old)
    kept, old = [*kept, *(version for version in old if version not in mine)], mine
    if old and rollouts is None and is_shared():
        notes.append(
            f"left: {len(old)} versions without an alias, as the registry is a shared one and no cluster is configured "
            "that tells what its ModelRollouts use (KUBECONFIG)"
        )
        kept, old = [*kept, *old], []
    begin = [named(store, ref) / "manifest.json" for version in kept for ref in registered_inputs(version)]
    begin += [Path(one.model_dir) for one in served]
    begin += [Path(step.manifest) for run in live for step in statuses(run) if step.manifest]
    begin += [Path(word) for word in read if "://" not in word]
    return Found(tuple(old), tuple(unneeded(store, needed(store, begin), days)), tuple(notes))


def take(found: Found, look: Callable[[], Found], store: Store, runs: Path) -> Found:
    """Remove it; returns what went. Versions first, then what still nothing needs: a version that stays, as somebody
    has named it meanwhile, needs its work."""
    versions = tuple(version for version in found.versions if retire(runs, version))
    still = look().work
    return Found(versions, tuple(work for work in found.work if work in still and remove(store, work)))


def lines(found: Found, gone: Found | None) -> Iterable[str]:
    """For people."""
    meanwhile = ": left, as it was used or named meanwhile"
    for version in found.versions:
        yield f"version  {version.name}/{version.version}{meanwhile if gone and version not in gone.versions else ''}"
    for work in found.work:
        idle = f"{gib(work.size_bytes)}, used {(time.time() - work.used) / DAY_SECONDS:.0f} days ago"
        yield f"work     {work.step}/{work.key}  {idle}{meanwhile if gone and work not in gone.work else ''}"
    yield from found.notes
    shown = found if gone is None else gone
    if not (shown.versions or shown.work):
        yield "nothing to remove: all of it is needed, or was used lately" if gone is None else "removed nothing"
        return
    size = gib(sum(work.size_bytes for work in shown.work))
    what = f"{len(shown.versions)} versions and {len(shown.work)} pieces of work, {size}"
    yield f"{what}, that nothing needs; --remove removes them" if gone is None else f"removed {what}"


def told(found: Found, gone: Found | None) -> dict[str, Any]:
    """For programs."""
    shown = found if gone is None else gone
    return {
        "removed": gone is not None,
        "versions": [{"name": one.name, "version": one.version} for one in shown.versions],
        "work": [{"step": one.step, "key": one.key, "size_bytes": one.size_bytes} for one in shown.work],
        "notes": list(found.notes),
    }


def _rollouts(here: Environment, namespaces: Sequence[str | None]) -> list[ModelRollout] | None:
    """Those of the cluster; None where no cluster is configured."""
    found: list[ModelRollout] = []
    for namespace in namespaces:
        if (cluster := configured(here.kubeconfig, namespace)) is None:
            return None
        try:
            found += Rollouts(cluster).all()
        except NotServed:  # a cluster that serves no models
            continue
    return found


def _used(one: ModelRollout) -> Iterable[tuple[str, str]]:
    """The versions that a ModelRollout names."""
    status = one.status
    for served in (status.champion, status.challenger, status.previous, *status.leaving):
        if served:
            yield status.model or one.model, served.version
    for override in (one.said.get("override"), status.overridden and status.overridden.model_dump()):
        if override:
            yield one.model, str(override["version"])
