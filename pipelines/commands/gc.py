"""`nvila gc`: shows versions and work of the store that nothing needs any more; removes them when told (`collect`)."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from nvila.components.tracking.redact import tell
from nvila.pipelines.commands.options import Json, Runs
from nvila.pipelines.commands.options import Store as StoreOption
from nvila.pipelines.show.as_json import put


def gc(
    context: typer.Context,
    days: Annotated[float, typer.Option(min=1, help="What was used within so many days stays.")] = 30.0,
    remove_: Annotated[
        bool, typer.Option("--remove", help="Remove what is shown; without it nothing changes.")
    ] = False,
    namespace: Annotated[
        list[str] | None,
        typer.Option(help="Namespace whose ModelRollouts are asked; repeatable, the context's by default."),
    ] = None,
    as_json: Json = False,
    runs: Runs = Path("runs"),
    store: StoreOption = Path("store"),
) -> None:
    """Show what nothing needs any more: work of the store, and versions of the registry; remove it with --remove.

    What an alias names stays, what a ModelRollout uses, what is served here and what a run that is going on reads, and
    all that these were made from. It may run beside runs. `make clean` removes everything of a checkout instead.

    Example: nvila gc --days 60
    """
    from nvila.components.contracts.store import Store
    from nvila.pipelines.commands.collect import find, lines, take, told

    place, where = Store(store.absolute()), runs.absolute()
    look = partial(find, place, where, days, context.obj, namespace or [None])
    found = look()
    gone = take(found, look, place, where) if remove_ else None
    if as_json:
        put(told(found, gone))
        return
    for line in lines(found, gone):
        typer.echo(tell(line))
