"""Where a step's work is done: in this process, or where the launcher that `NVILA_SITE` names takes it.

Steps, content keys and manifests know nothing of it: the same work has the same identity wherever it was done.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Protocol, cast

from nvila.components.contracts.environment import Environment, name_of
from nvila.components.contracts.errors import ConfigError
from nvila.components.contracts.manifest import Manifest
from nvila.components.contracts.step import Outcome, call


@dataclass(frozen=True)
class Work:
    """One execution of a step: what a site has to know to have it done."""

    step: str
    module: str
    """Dotted name of the step module."""
    key: str
    """The content key."""
    settings: Mapping[str, Any]
    """The step's slice as JSON."""
    inputs: Mapping[str, Manifest]
    out: Path
    """The step's folder in the store."""
    run_dir: Path
    """Folder of the pipeline run."""
    here: Environment
    """Of the step's own process."""


class Launcher(Protocol):
    """A module that has heavy work done elsewhere and cleans up there when a run ends."""

    def takes(self, work: Work) -> bool:
        """Whether this work is done elsewhere."""
        ...

    def run(self, work: Work) -> Outcome:
        """Have the work done in `work.out`, and wait for it.

        Raises:
            NvilaError: what stopped it there, with its exit code.
        """
        ...

    def close(self, run: str, here: Environment) -> None:
        """Stop what is still under way for a pipeline run that has ended."""
        ...


def launcher_of(here: Environment) -> Launcher | None:
    """The site's launcher, or None where every step does its own work.

    Raises:
        ConfigError: the module cannot be imported.
    """
    if not here.site or not here.site.launcher:
        return None
    try:
        return cast(Launcher, importlib.import_module(here.site.launcher))
    except ImportError as error:
        raise ConfigError(f"no such launcher: {error}", where=name_of("site"), value=here.site.launcher) from error


def do(work: Work) -> Outcome:
    """Do the work, here or elsewhere."""
    code = importlib.import_module(work.module)
    settings = code.Settings.model_validate(work.settings)
    launcher = launcher_of(work.here)
    if launcher is not None and launcher.takes(work):
        return launcher.run(work)
    return replace(call(code.run, settings, work.inputs, work.out, here=work.here), machine=machine(work.here.threads))


def machine(threads: str) -> dict[str, Any]:
    """What decides how sums are rounded here: the threads that a step may use, and the kind of CPU."""
    return {"threads": int(threads) if threads.isdigit() else len(os.sched_getaffinity(0)), "cpu": _cpu()}


@cache
def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
