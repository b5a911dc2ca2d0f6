"""What an experiment would do, and about how long it takes; nothing is made."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from nvila.components.contracts.environment import current, entered
from nvila.components.contracts.store import Store
from nvila.pipelines.ablate import prepare
from nvila.pipelines.ablate.cases import Case
from nvila.pipelines.ablate.estimate import sizes_of, work_of
from nvila.pipelines.ablate.work import duration
from nvila.pipelines.show.watch import print_line

if TYPE_CHECKING:
    from nvila.pipelines.ablate.experiment import Experiment


def show_plan(experiment: Experiment, jobs: int, console: Console) -> None:
    """Print the cases, those that are finished, and an estimate of the rest."""
    places, design = experiment.places, experiment.design
    here = current().model_copy(update={"store": places.store, "run": places.runs / "ablate-prune"})
    with entered(here):
        found = prepare.look(experiment.recipe, design.methods, design.spoilt)
        shared = prepare.shared(experiment.recipe, found, design.spoilt)
        store = Store(places.store)
        tasks = experiment.tasks(shared) if shared else {}
        finished = {case for case, task in tasks.items() if task.finished(store)}
        costs = [tasks[case].cost(store)["cpu_seconds"] for case in finished]
    sizes = sizes_of(found)
    table = Table("case", "steps", "CPU seconds", "")
    known: dict[Case, float] = {}
    for case in design.runs():
        steps, seconds = work_of(experiment.recipe, case, design.reference, sizes) if sizes else ({}, None)
        if seconds is not None:
            known[case] = seconds
        shown = " + ".join(f"{n}" for n in steps.values())
        table.add_row(case.name, shown, f"{seconds:.0f}" if seconds else "", "finished" if case in finished else "")
    for name in prepare.names(experiment.recipe, design.spoilt):
        print_line(console, f"{name:<22} {'in the store' if name in found else 'to be made'}")
    console.print(table)
    rows = sum(1 for _ in design.rows())
    print_line(console, f"{len(design.runs())} trainings for {rows} rows of the table; {len(finished)} are finished")
    if not known:
        print_line(console, "steps and time can be told once the samples are validated")
        return
    scale = sum(costs) / sum(known[case] for case in finished) if finished else 1.0
    left = scale * sum(seconds for case, seconds in known.items() if case not in finished)
    by = "as the finished ones took" if finished else "as models of tiny's size take"
    print_line(
        console, f"about {duration(left)} of CPU time for the others, {by}; {duration(left / jobs)} with {jobs} jobs"
    )
