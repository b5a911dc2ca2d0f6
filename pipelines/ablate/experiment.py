"""The experiment from a recipe to its result: what is made, which cases are trained, what is written."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from nvila.components.contracts.environment import current, entered
from nvila.components.contracts.files import read_json, write_atomic
from nvila.components.contracts.recipe.recipe import Recipe
from nvila.components.contracts.store import Store
from nvila.pipelines.ablate import page, prepare, record, work
from nvila.pipelines.ablate import table as tables
from nvila.pipelines.ablate.attempt import ANSWERS_FILE, CASE_FILE
from nvila.pipelines.ablate.case import Settings
from nvila.pipelines.ablate.cases import Case, Design
from nvila.pipelines.ablate.estimate import sizes_of, work_of
from nvila.pipelines.ablate.statistics import RULES

STEP, MODULE = "ablate-case", "nvila.pipelines.ablate.case"


@dataclass(frozen=True)
class Places:
    """Where things lie."""

    store: Path
    runs: Path
    out: Path
    """The JSON file; page and logs lie beside it."""

    @property
    def ledger(self) -> Path:
        """What the shared steps have cost, kept for a later call."""
        return self.out.with_suffix(".costs.json")

    @property
    def log(self) -> Path:
        """What the cases print."""
        return self.out.with_suffix("") / "log"

    @property
    def page(self) -> Path:
        """The result as a page."""
        return self.out.with_suffix(".html")


@dataclass(frozen=True)
class Experiment:
    """A recipe and what is compared on it."""

    recipe: Recipe
    design: Design
    places: Places
    command: list[str] = field(default_factory=list)
    """The command line, for the result."""

    def run(self, jobs: int, told: Any) -> dict[str, Any]:
        """Make what is missing, and write the result.

        Args:
            jobs: cases side by side.
            told: takes a line of progress.

        Raises:
            Preempted: asked to stop; the same call goes on.
            NvilaError: a step or a case failed.
        """
        here = current().model_copy(update={"store": self.places.store, "run": self.places.runs / "ablate-prune"})
        with entered(here):
            began = time.monotonic()
            shared = prepare.prepare(self.recipe, self.design.methods, self.design.spoilt, self.places.ledger)
            tasks = self.tasks(shared)
            store = Store(self.places.store)
            missing = [task for task in tasks.values() if task.finished(store) is None]
            told(f"{len(tasks)} cases, {len(tasks) - len(missing)} of them finished; {jobs} at a time")
            work.Crew(jobs, self.places.log, told).run(missing)
            record.charge_own(self.places.ledger)
            result = self._result(shared, tasks, store, time.monotonic() - began)
        write_atomic(self.places.out, json.dumps(result, indent=1) + "\n")
        write_atomic(self.places.page, page.render(result))
        return result

    def tasks(self, shared: prepare.Shared) -> dict[Case, work.Task]:
        """The work of each run, in order."""
        recipe = self.recipe
        rows = {name: stage.model_dump(mode="json") for name, stage in prepare.pruned_stages(recipe).items()}
        common = {
            "reference": self.design.reference,
            "score": recipe.prune.score,
            "stages": rows,
            "run": recipe.train.run.model_dump(mode="json"),
            "tasks": recipe.evaluate.tasks.model_dump(mode="json"),
            "question_seed": recipe.seed,
        }
        found, sizes = {}, sizes_of(shared.manifests)
        for case in self.design.runs():
            own = {"method": case.method, "ratio": case.ratio, "schedule": case.schedule, "seed": case.seed}
            settings = Settings.model_validate(common | own).model_dump(mode="json")
            _, expected = work_of(recipe, case, self.design.reference, sizes)
            found[case] = work.Task(STEP, MODULE, case.name, settings, shared.inputs(case.spoilt), expected)
        return found

    def _result(
        self, shared: prepare.Shared, tasks: Mapping[Case, work.Task], store: Store, seconds: float
    ) -> dict[str, Any]:
        import pyarrow.parquet as parquet

        finished = dict(zip(tasks, record.all_finished(list(tasks.values()), store), strict=True))
        answers = {
            case: tables.answers_of(parquet.read_table(manifest.path(ANSWERS_FILE)).to_pylist())
            for case, manifest in finished.items()
        }
        rows = tables.table(self.design, answers)
        told = {case: read_json(Path(manifest.path(CASE_FILE))) for case, manifest in finished.items()}
        costs = {case: task.cost(store) for case, task in tasks.items()}
        prepared = record.costs_of(shared.manifests, self.places.ledger)
        return {
            **record.provenance(self.command, self.recipe),
            "design": asdict(self.design) | {"spoilt_share": prepare.SPOILT_SHARE, "reference": self.design.reference},
            "rules": [rule.format(baseline="random") for rule in RULES] + SCHEDULE_RULES,
            **record.spent([*costs.values(), *prepared.values()]),
            "seconds_of_this_call": round(seconds, 1),
            "prepared": prepared,
            "cases": list(self._cases(told, costs, tasks, answers)),
            "table": [row.json for row in rows],
            "spoilt": spoilt_dropped(self.design, told),
        }

    def _cases(
        self,
        told: Mapping[Case, Mapping[str, Any]],
        costs: Mapping[Case, Mapping[str, float]],
        tasks: Mapping[Case, work.Task],
        answers: Mapping[Case, tables.Answers],
    ) -> Iterator[dict[str, Any]]:
        for case in self.design.rows():
            run = self.design.run_of(case)
            accuracy: dict[str, Any] = {}
            for (stage, source, kind), worth in sorted(answers[run].items()):
                of = accuracy.setdefault(stage, {}).setdefault(source, {})
                of[kind] = round(sum(worth.values()) / len(worth), 4)
            yield {
                **asdict(case),
                "shared_with": None if run == case else run.name,
                "key": tasks[run].key,
                "kept": told[run]["kept"],
                "stages": told[run]["stages"],
                "accuracy": accuracy,
                **costs[run],
            }


SCHEDULE_RULES = [
    "epoch: the recipe's passes over the subset, of captions the same share as of the samples",
    "steps: for every subset as many optimizer steps as the recipe's passes over the largest ratio make, in the same "
    "mixture; at that ratio both schedules are one run, whose passes are the recipe's to within one batch",
    "the same number of samples for every method: where references are not trusted, chance chooses",
    "seeds: order of training, random choices, and which samples of a cluster stay; references and clusters are made "
    "once",
]


def spoilt_dropped(design: Design, told: Mapping[Case, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """By method and source: what share of the spoilt samples it drops at the reference ratio, of all seeds."""
    found: dict[str, dict[str, Any]] = {}
    for method in design.methods if design.spoilt else ():
        every = [told[case]["spoilt"] for case in told if case.spoilt and case.method == method]
        for source in sorted(every[0]):
            shares = [seed[source][0] / seed[source][1] for seed in every]
            found.setdefault(method, {})[source] = {
                "spoilt": every[0][source][1],
                "dropped_share": round(sum(shares) / len(shares), 4),
                "by_seed": [round(share, 4) for share in shares],
                "by_chance": round(1 - design.reference, 4),
            }
    return found
