"""What an experiment would do, and about how long it takes; nothing is made."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from nvila.components.contracts.environment import current, entered
from nvila.components.contracts.manifest import Manifest
from nvila.components.contracts.results.model import Validation
from nvila.components.contracts.steps import VALIDATE
from nvila.components.contracts.store import Store
from nvila.pipelines.ablate import passes, prepare
from nvila.pipelines.ablate.case import at_ratio, rows_of
from nvila.pipelines.ablate.cases import Case
from nvila.pipelines.ablate.work import duration
from nvila.pipelines.show.watch import print_line

if TYPE_CHECKING:
    from nvila.pipelines.ablate.experiment import Experiment

CASE_SECONDS = 20.0
PICTURE_SECONDS, CLIP_SECONDS = 0.0025, 0.009
"""CPU seconds of a case, and of each sample that it trains on: measured with `tiny` on an AMD EPYC. Larger models take
longer, about in proportion to their parameters; finished cases of the same experiment tell better."""


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
    sizes = _sizes(found)
    table = Table("case", "steps", "CPU seconds", "")
    known: dict[Case, float] = {}
    for case in design.runs():
        steps, seconds = _work(experiment, case, sizes) if sizes else ({}, None)
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


def _sizes(found: Mapping[str, Manifest]) -> dict[str, int]:
    """Samples by subset."""
    if VALIDATE not in found:
        return {}
    records = found[VALIDATE].told(Validation).records
    return {f"{source}.{split}": n for source, splits in records.items() for split, n in splits.items()}


def _work(experiment: Experiment, case: Case, sizes: dict[str, int]) -> tuple[dict[str, int], float]:
    """Steps by stage, and CPU seconds."""
    clips, stages = experiment.recipe.data.videos, prepare.pruned_stages(experiment.recipe)
    stay, reference = at_ratio(sizes, case.ratio), at_ratio(sizes, experiment.design.reference)
    steps, seconds = dict[str, int](), CASE_SECONDS
    for name, row in rows_of(stages, case.schedule, sizes, stay, reference).items():
        steps[name] = passes.steps_of(row, stay)
        for subset, times in row.data.items():
            rate = CLIP_SECONDS if subset.partition(".")[0] in clips else PICTURE_SECONDS
            seconds += rate * times * stay[subset]
    return steps, seconds
