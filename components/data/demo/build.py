"""Builds a demonstration source once: in a hidden folder beside its place, renamed there when it is whole."""

from __future__ import annotations

import json
import shutil
from importlib import import_module
from pathlib import Path
from typing import Any

from nvila.components.contracts.errors import ConfigError
from nvila.components.contracts.locks import alone
from nvila.components.contracts.manifest import write_atomic
from nvila.components.contracts.recipe.data import Source
from nvila.components.data.demo.draft import Draft
from nvila.components.data.stamp import STAMP, as_built, content_digest, read_stamp

SEED = 20
VERSION = 1
"""Raise it when a builder writes something else, so that older folders are built again."""


def ensure(source: Source) -> None:
    """Make sure that `source.path` holds the demonstration source; do nothing where `source.demo` is None.

    A folder with the right stamp is left alone; one that this function made with other parameters is replaced while it
    is as it was built. An interrupted build leaves nothing at `source.path`.

    Raises:
        ConfigError: something that this function did not make lies at `source.path`.
    """
    if source.demo is None:
        return
    place = Path(source.path).absolute()
    wanted = {"demo": source.demo, "scale": source.demo_scale, "seed": SEED, "version": VERSION}
    if read_stamp(place).get("parameters") == wanted:
        return
    place.parent.mkdir(parents=True, exist_ok=True)
    with alone(place.parent / f".{place.name}.lock", f"{place}: another process builds it"):
        if read_stamp(place).get("parameters") == wanted:  # another process built it while this one waited
            return
        if place.exists() and (not place.is_dir() or any(place.iterdir())) and not as_built(place):
            raise ConfigError(
                f"data source {source.name!r} asks for the demo {source.demo!r}, but other files lie here",
                where=str(place),
                do="Give another path, leave out `demo` to use the folder as it is, or move it away.",
            )
        _build(place, wanted)


def _build(place: Path, parameters: dict[str, Any]) -> None:
    fresh = place.parent / f".{place.name}.building"
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir()
    draft = Draft(fresh, SEED)
    import_module(f"nvila.components.data.demo.{parameters['demo']}").build(draft, parameters["scale"])
    counts = draft.write()
    content = content_digest(fresh)
    stamp = {"parameters": parameters, "records": counts, "spoilt": draft.spoilt, "content": content}
    write_atomic(fresh / STAMP, json.dumps(stamp, indent=1) + "\n")
    if place.exists():
        old = place.parent / f".{place.name}.old"
        shutil.rmtree(old, ignore_errors=True)
        place.rename(old)
        fresh.rename(place)
        shutil.rmtree(old)
    else:
        fresh.rename(place)
