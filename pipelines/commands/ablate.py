"""`nvila ablate`: plan or run an experiment, and show its table."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from nvila.components.contracts.errors import ConfigError
from nvila.components.contracts.recipe.recipe import slices
from nvila.components.contracts.steps import PREFLIGHT
from nvila.components.contracts.text import say, visible
from nvila.components.preflight import step as preflight
from nvila.pipelines.ablate import trials
from nvila.pipelines.ablate.cases import ALL, Design
from nvila.pipelines.ablate.experiment import Experiment, Places
from nvila.pipelines.ablate.plan import show_plan
from nvila.pipelines.ablate.trials import Trials
from nvila.pipelines.commands.overrides import asked_for
from nvila.pipelines.show.results import short
from nvila.pipelines.show.watch import print_line

OUT = Path("bench", "prune.json")
"""Below the runs, where `--out` does not say otherwise."""


def prune(
    recipe: str,
    overrides: Sequence[str],
    design: Design,
    *,
    jobs: int | None,
    out: Path | None,
    store: Path,
    runs: Path,
    dry_run: bool,
) -> None:
    """Do what the command says.

    Args:
        recipe, overrides: as of `nvila run`.
        design: what is compared.
        jobs: cases side by side; one per core by default.
        out: the JSON file to write.
        store, runs: as of `nvila run`.
        dry_run: show what would be done, and make nothing.

    Raises:
        ConfigError, PreflightError: the input is wrong; nothing was made.
        Preempted: stopped; the same command goes on.
    """
    _, checked = asked_for(recipe, overrides)
    places = Places(store.absolute(), runs.absolute(), (out or runs / OUT).absolute())
    experiment = Experiment(checked, design, places, ["nvila", *sys.argv[1:]])
    console = Console(width=None if sys.stdout.isatty() else 160)
    cores = len(os.sched_getaffinity(0))
    if dry_run:
        show_plan(experiment, jobs or cores, console)
        return
    _refuse_early(recipe, overrides, places)
    result = experiment.run(jobs or cores, say)
    show(result, console)
    _told(places, console)


def of_models(
    kind: type[Trials],
    recipe: str,
    overrides: Sequence[str],
    design: trials.Design,
    *,
    jobs: int | None,
    out: Path,
    store: Path,
    runs: Path,
    dry_run: bool,
) -> None:
    """Do what the command of an experiment on trained models says; arguments and errors as of `prune`."""
    _, checked = asked_for(recipe, overrides)
    places = Places(store.absolute(), runs.absolute(), out.absolute())
    experiment = kind(checked, design, places, ["nvila", *sys.argv[1:]])
    console = Console(width=None if sys.stdout.isatty() else 180)
    if dry_run:
        table = Table("case", "")
        for case, finished in experiment.finished().items():
            table.add_row(case.name, "finished" if finished else "")
        console.print(table)
        return
    _refuse_early(recipe, overrides, places)
    result = experiment.run(jobs or len(os.sched_getaffinity(0)), say)
    head, rows = experiment.lines(result)
    table = Table(*head)
    for row in rows:
        table.add_row(*row)
    print_line(console, f"\n{experiment.CAPTION}", style="bold")
    console.print(table)
    print_line(console, f"{result['cpu_seconds'] / 60:.0f} CPU minutes")
    _told(places, console)


def _refuse_early(recipe: str, overrides: Sequence[str], places: Places) -> None:
    """As preflight does before a run, but for the endpoint: nothing is served.

    Raises:
        PreflightError: what the machine lacks.
    """
    _, unserved = asked_for(recipe, [*overrides, "rollout.target=none"])
    needs = preflight.Settings.model_validate(slices(unserved)[PREFLIGHT])
    preflight.refuse(preflight.problems(needs, places.runs, places.store, demo_can_be_built=True))


def _told(places: Places, console: Console) -> None:
    for label, path in (("numbers", places.out), ("page", places.page), ("logs", places.log)):
        print_line(console, f"{label:<8} {visible(short(path))}")


def words(text: str) -> tuple[str, ...]:
    """What stands between the commas."""
    return tuple(dict.fromkeys(word.strip() for word in text.split(",") if word.strip()))


def numbers(text: str, where: str) -> tuple[float, ...]:
    """The same as numbers.

    Raises:
        ConfigError: one of them is none.
    """
    try:
        return tuple(dict.fromkeys(map(float, words(text))))
    except ValueError:
        raise ConfigError("numbers with commas between them are asked for", where=where, value=text) from None


def show(result: Mapping[str, Any], console: Console) -> None:
    """Print the result as tables."""
    for spoilt in (False, True):
        rows = [row for row in result["table"] if row["spoilt"] is spoilt]
        for stage in dict.fromkeys(row["stage"] for row in rows):
            title = f"accuracy after {stage}" + (", of data with spoilt answers" if spoilt else "")
            print_line(console, f"\n{title} (mean ± standard deviation over seeds)", style="bold")
            console.print(_accuracy([row for row in rows if row["stage"] == stage]))
    if result["spoilt"]:
        share, ratio = result["design"]["spoilt_share"], result["design"]["reference"]
        title = f"{share:.0%} of the answers spoilt: what share of these is dropped at keep ratio {ratio:g}"
        print_line(console, f"\n{title}", style="bold")
        console.print(_dropped(result["spoilt"]))
    minutes = result["cpu_seconds"] / 60
    print_line(console, f"\n+ better than random, - below it, beyond noise; the rest is not. {minutes:.0f} CPU minutes")


def _accuracy(rows: Sequence[Mapping[str, Any]]) -> Table:
    groups = list(dict.fromkeys((row["source"], row["kind"]) for row in rows))
    table = Table("trained", "kept", "method", *(f"{source}\n{kind}" for source, kind in groups))
    cells = {(row["schedule"], row["ratio"], row["method"], row["source"], row["kind"]): row for row in rows}
    for schedule, ratio, method in dict.fromkeys((row["schedule"], row["ratio"], row["method"]) for row in rows):
        found = [cells[schedule, ratio, method, *group] for group in groups]
        table.add_row(schedule, "all" if method == ALL else f"{ratio:g}", method, *map(_cell, found))
    return table


def _cell(row: Mapping[str, Any]) -> str:
    mark = {"better": " +", "below": " -"}.get(row["verdict"] or "", "")
    return f"{row['mean']:.3f} ± {row['spread']:.3f}{mark}"


def _dropped(spoilt: Mapping[str, Any]) -> Table:
    sources = list(next(iter(spoilt.values())))
    table = Table("method", *sources)
    for method, told in spoilt.items():
        table.add_row(method, *(f"{told[source]['dropped_share']:.3f}" for source in sources))
    return table
