"""`nvila ablate spatial`: scale, then compress, on a small model: plain, S2, S2 with fewer tokens, and VEP besides."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from nvila.components.contracts.environment import current, entered
from nvila.components.contracts.files import read_json, write_atomic
from nvila.components.contracts.manifest import Manifest
from nvila.components.contracts.recipe.recipe import Recipe
from nvila.components.contracts.recipe.train import Stage
from nvila.components.contracts.steps import VALIDATE
from nvila.components.contracts.store import Store
from nvila.pipelines.ablate import page, prepare, record, spatial_table, work
from nvila.pipelines.ablate.attempt import ANSWERS_FILE, CASE_FILE
from nvila.pipelines.ablate.experiment import Places
from nvila.pipelines.ablate.spatial_case import Settings
from nvila.pipelines.ablate.spatial_cases import Case, Design, rows_of

STEP, MODULE = "ablate-spatial-case", "nvila.pipelines.ablate.spatial_case"
RUN = "ablate-spatial"


@dataclass(frozen=True)
class Experiment:
    """A recipe whose model is made anew for each row and seed."""

    recipe: Recipe
    design: Design
    places: Places
    command: list[str] = field(default_factory=list)
    """The command line, for the result."""

    @property
    def stages(self) -> dict[str, Stage]:
        """Of the recipe, by step."""
        return rows_of(self.recipe)

    def run(self, jobs: int, told: Any) -> dict[str, Any]:
        """Make what is missing, and write the result.

        Args:
            jobs: cases side by side.
            told: takes a line of progress.

        Raises:
            ConfigError: the recipe cannot be trained as the table's rows.
            Preempted: asked to stop; the same call goes on.
            NvilaError: a step or a case failed.
        """
        _ = self.stages
        with entered(self._here()):
            began, store = time.monotonic(), Store(self.places.store)
            shared = prepare.make(self.recipe, prepare.steps_to(self.recipe, VALIDATE), self.places.ledger)
            tasks = self.tasks(shared[VALIDATE])
            missing = [task for task in tasks.values() if task.finished(store) is None]
            told(f"{len(tasks)} cases, {len(tasks) - len(missing)} of them finished; {jobs} at a time")
            work.Crew(jobs, self.places.log, told).run(missing)
            record.charge_own(self.places.ledger)
            result = self._result(shared, tasks, store, time.monotonic() - began)
        write_atomic(self.places.out, json.dumps(result, indent=1) + "\n")
        write_atomic(self.places.page, page.document("Scale, then compress", _body(result)))
        return result

    def tasks(self, samples: Manifest) -> dict[Case, work.Task]:
        """The work of each case, in order."""
        recipe, stages, found = self.recipe, self.stages, {}
        for case in self.design.runs():
            settings = Settings(
                model=case.setting.of(recipe.model),
                stages=case.setting.stages(stages),
                run=recipe.train.run,
                tasks=recipe.evaluate.tasks,
                seed=recipe.seed + case.seed,
                question_seed=recipe.seed,
            )
            found[case] = work.Task(STEP, MODULE, case.name, settings.model_dump(mode="json"), {"samples": samples})
        return found

    def finished(self) -> dict[Case, bool]:
        """Of each case whether it is in the store."""
        _ = self.stages
        with entered(self._here()):
            there = prepare.there(prepare.steps_to(self.recipe, VALIDATE))
            if VALIDATE not in there:
                return dict.fromkeys(self.design.runs(), False)
            store = Store(self.places.store)
            return {case: task.finished(store) is not None for case, task in self.tasks(there[VALIDATE]).items()}

    def _here(self) -> Any:
        return current().model_copy(update={"store": self.places.store, "run": self.places.runs / RUN})

    def _result(
        self, shared: Mapping[str, Manifest], tasks: Mapping[Case, work.Task], store: Store, seconds: float
    ) -> dict[str, Any]:
        import pyarrow.parquet as parquet

        finished = dict(zip(tasks, record.all_finished(list(tasks.values()), store), strict=True))
        answers = {case: parquet.read_table(made.path(ANSWERS_FILE)).to_pylist() for case, made in finished.items()}
        told = {case: read_json(Path(made.path(CASE_FILE))) for case, made in finished.items()}
        costs = {case: task.cost(store) for case, task in tasks.items()}
        prepared = record.costs_of(shared, self.places.ledger)
        cases = [
            {"setting": case.setting.name, "seed": case.seed, "key": tasks[case].key, **told[case], **costs[case]}
            for case in tasks
        ]
        return {
            **record.provenance(self.command, self.recipe),
            "design": asdict(self.design),
            "rules": list(spatial_table.RULES),
            **record.spent([*costs.values(), *prepared.values()]),
            "seconds_of_this_call": round(seconds, 1),
            "prepared": prepared,
            "cases": cases,
            "table": spatial_table.table(self.design, answers, told),
        }


def lines(result: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Head and rows of the table: settings downwards, sources across."""
    rows = result["table"]
    sources = list(dict.fromkeys(row["source"] for row in rows))
    cells = {(row["setting"], row["source"]): row for row in rows}
    minutes = {name: sum(c["cpu_seconds"] for c in result["cases"] if c["setting"] == name) / 60 for name, _ in cells}
    head = ["", "pool", "tiles", "tokens", *sources, "CPU minutes a seed"]
    body = []
    for name in dict.fromkeys(row["setting"] for row in rows):
        first = cells[name, sources[0]]
        shown = [first["pool"], f"{first['tiles']:.1f}", f"{first['tokens']:.0f}"]
        body.append(
            [name, *shown, *(cell(cells[name, s]) for s in sources), f"{minutes[name] / result['design']['seeds']:.1f}"]
        )
    chances = {row["source"]: row["chance"] for row in rows if "chance" in row}
    body.append(["chance", "", "", "", *(f"{chances[s]:.3f}" if s in chances else "" for s in sources), ""])
    return head, body


def cell(row: Mapping[str, Any]) -> str:
    """Mean and spread, with a mark where it is no better than chance, or differs from the row above."""
    mark = {"better": " +", "below": " -"}.get(row.get("verdict") or "", "")
    return f"{row['mean']:.3f} ± {row['spread']:.3f}{mark}" + ("" if row.get("above_chance", True) else " (at chance)")


CAPTION = (
    "Accuracy on held-out questions after stage 4, mean ± standard deviation over seeds; "
    "+ better than the row above, - below it, beyond noise."
)


def _body(result: Mapping[str, Any]) -> Iterator[str]:
    yield from page.header(result, "Scale, then compress")
    head, body = lines(result)
    yield page.table(CAPTION, head, body)
    yield from page.rules(result)
