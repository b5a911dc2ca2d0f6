"""The experiment from a recipe to its result: what is made, which cases are trained, what is written."""

from __future__ import annotations

import json
import os
import platform
import resource
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from nvila.components.contracts.environment import current, entered
from nvila.components.contracts.errors import NvilaError
from nvila.components.contracts.files import read_json, write_atomic
from nvila.components.contracts.manifest import Manifest
from nvila.components.contracts.recipe.recipe import Recipe
from nvila.components.contracts.store import Store
from nvila.components.runner.code import code_digest
from nvila.components.runner.work import machine
from nvila.pipelines.ablate import page, prepare, work
from nvila.pipelines.ablate import table as tables
from nvila.pipelines.ablate.case import ANSWERS_FILE, CASE_FILE, Settings
from nvila.pipelines.ablate.cases import Case, Design
from nvila.pipelines.ablate.estimate import sizes_of, work_of
from nvila.pipelines.ablate.statistics import RULES

LIBRARIES = ("torch", "transformers", "deepspeed", "numpy", "scipy", "scikit-learn")

OWN = "the command itself"


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
            self._charge_own()
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
            found[case] = work.Task(case.name, settings, shared.inputs(case.spoilt), expected)
        return found

    def _result(
        self, shared: prepare.Shared, tasks: Mapping[Case, work.Task], store: Store, seconds: float
    ) -> dict[str, Any]:
        import pyarrow.parquet as parquet

        made = {case: task.finished(store) for case, task in tasks.items()}
        if lost := [case.name for case, manifest in made.items() if manifest is None]:
            raise NvilaError(f"{len(lost)} cases are not in the store", value=lost[0], do="Run the same command again.")
        finished = {case: manifest for case, manifest in made.items() if manifest}
        answers = {
            case: tables.answers_of(parquet.read_table(manifest.path(ANSWERS_FILE)).to_pylist())
            for case, manifest in finished.items()
        }
        rows = tables.table(self.design, answers)
        told = {case: read_json(Path(manifest.path(CASE_FILE))) for case, manifest in finished.items()}
        costs = {case: task.cost(store) for case, task in tasks.items()}
        prepared = self._prepared(shared)
        spent = [*costs.values(), *prepared.values()]
        return {
            "schema_version": 1,
            "command": self.command,
            "written": datetime.now(UTC).isoformat(timespec="seconds"),
            "commit": commit(),
            "code": code_digest(),
            "machine": machine("") | {"cores": len(os.sched_getaffinity(0)), "python": platform.python_version()},
            "libraries": {name: version(name) for name in LIBRARIES},
            "recipe": self.recipe.model_dump(mode="json", by_alias=True),
            "design": asdict(self.design) | {"spoilt_share": prepare.SPOILT_SHARE, "reference": self.design.reference},
            "rules": [rule.format(baseline="random") for rule in RULES] + SCHEDULE_RULES,
            "cpu_seconds": round(sum(one.get("cpu_seconds") or 0.0 for one in spent), 1),
            "work_seconds": round(sum(one.get("seconds") or 0.0 for one in spent), 1),
            "seconds_of_this_call": round(seconds, 1),
            "prepared": prepared,
            "cases": list(self._cases(told, costs, tasks, answers)),
            "table": [row.json for row in rows],
            "spoilt": spoilt_dropped(self.design, told),
        }

    def _charge_own(self) -> None:
        """Add to the ledger what this process itself has spent: imports and pictures that all cases share."""
        used, ledger = resource.getrusage(resource.RUSAGE_SELF), read_json(self.places.ledger)
        before = ledger.get(OWN, {}).get("cpu_seconds", 0.0)
        ledger[OWN] = {"cpu_seconds": round(before + used.ru_utime + used.ru_stime, 1)}
        write_atomic(self.places.ledger, json.dumps(ledger, indent=1))

    def _prepared(self, shared: prepare.Shared) -> dict[str, dict[str, Any]]:
        ledger = read_json(self.places.ledger)
        found = {}
        for name, manifest in shared.manifests.items():
            told = ledger.get(f"{manifest.step}/{manifest.key}")
            # Made by a run, which keeps no CPU time: all its threads, all the time, at most.
            most = round(manifest.seconds * int(manifest.machine.get("threads", 1)), 1)
            cost = told or {"seconds": manifest.seconds, "cpu_seconds": most, "at_most": True}
            found[name] = {"key": manifest.key} | cost
        return found | ({OWN: ledger[OWN]} if OWN in ledger else {})

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


def commit() -> str | None:
    """Of the checkout that this code lies in; None where it is installed elsewhere."""
    try:
        asked = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
        return subprocess.run(asked, capture_output=True, text=True, timeout=10).stdout.strip() or None
    except (OSError, subprocess.TimeoutExpired):
        return None


def found_manifests(tasks: Sequence[work.Task], store: Store) -> list[Manifest]:
    """Of those tasks that are finished."""
    return [made for task in tasks if (made := task.finished(store))]
