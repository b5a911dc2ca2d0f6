"""What the registry is still to be told, as single requests. Each may be repeated, and another has come between."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from nvila.components.contracts.modelrollout import Alias, Write
from nvila.components.tracking.registry import CHALLENGER, CHAMPION
from nvila.infra.controller.seen import Aliases


class Operation(NamedTuple):
    """One request to the registry: an alias is to name a version (none: it goes), or a version gets a tag."""

    alias: Alias | None
    version: str
    tag: str = ""
    text: str = ""


def operations(pending: Sequence[Write], aliases: Aliases) -> list[Operation]:
    """What the registry is to be told, in this order, where its aliases are these.

    An alias that names another version than when it was decided was moved by hand meanwhile: `challenger` is left to
    whoever did so, and who moved `champion` has asked for that version.
    """
    now, made = dict(vars(aliases)), list[Operation]()

    def point(alias: Alias, version: str) -> None:
        if now[alias] != version:
            now[alias] = version
            made.append(Operation(alias, version))

    for write in pending:
        if write.alias is None:
            made.append(Operation(None, write.version, write.tag, write.text))
            continue
        found = now[write.alias]
        moved = bool(found) and write.expects is not None and found not in (write.expects, write.version)
        if not moved:
            point(write.alias, write.version)
        elif write.alias == CHAMPION and write.version:
            point(write.alias, write.version)
            point(CHALLENGER, found)
    return made
