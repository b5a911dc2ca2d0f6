"""Where a step's work is done: in this process, or where the module that `NVILA_SITE` names takes it.

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

from nvila.components.contracts.errors import ConfigError
from nvila.components.contracts.manifest import Manifest
from nvila.components.contracts.step import Outcome

SITE_VARIABLE = "NVILA_SITE"
"""Environment variable: dotted name of a module that is a `Site`; empty does every step's work in its own process."""


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


class Site(Protocol):
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

    def close(self, run: str) -> None:
        """Stop what is still under way for a pipeline run that has ended."""
        ...


def chosen() -> Site | None:
    """The site of this process, or None where every step does its own work.

    Raises:
        ConfigError: the module cannot be imported.
    """
    name = os.environ.get(SITE_VARIABLE)
    if not name:
        return None
    try:
        return cast(Site, importlib.import_module(name))
    except ImportError as error:
        raise ConfigError(f"no such site: {error}", where=SITE_VARIABLE, value=name) from error


def do(work: Work) -> Outcome:
    """Do the work, here or elsewhere."""
    code = importlib.import_module(work.module)
    settings = code.Settings.model_validate(work.settings)
    site = chosen()
    if site is not None and site.takes(work):
        return site.run(work)
    return replace(code.run(settings, work.inputs, work.out), machine=machine())


def machine() -> dict[str, Any]:
    """What decides how sums are rounded here: the threads that a step may use, and the kind of CPU."""
    threads = os.environ.get("OMP_NUM_THREADS", "")
    return {"threads": int(threads) if threads.isdigit() else len(os.sched_getaffinity(0)), "cpu": _cpu()}


@cache
def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
