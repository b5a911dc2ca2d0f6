"""What experiments on models that a recipe trains have in common: shared steps, cases in the store, the result."""

from __future__ import annotations

import json
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Protocol

from nvila.components.contracts.environment import current, entered
from nvila.components.contracts.files import read_json, write_atomic
from nvila.components.contracts.manifest import Manifest
from nvila.components.contracts.recipe.recipe import Recipe
from nvila.components.contracts.recipe.section import Section
from nvila.components.contracts.store import Store
from nvila.pipelines.ablate import page, prepare, record, work
from nvila.pipelines.ablate.attempt import ANSWERS_FILE, CASE_FILE
from nvila.pipelines.ablate.experiment import Places


class Case(Protocol):
    """One training."""

    @property
    def name(self) -> str:
        """For people and logs."""

    @property
    def told(self) -> Mapping[str, Any]:
        """What it is, for the result."""


class Design(Protocol):
    """What is compared: a data class."""

    def runs(self) -> Sequence[Any]:
        """All cases, those with the lowest seeds first: a stop half-way leaves whole tables of fewer seeds."""


Answers = Mapping[Any, Sequence[Mapping[str, Any]]]
"""The answer table of each case."""
Told = Mapping[Any, Mapping[str, Any]]
"""What each case tells of itself."""


@dataclass(frozen=True)
class Trials(ABC):
    """A recipe, and the cases that are made of it."""

    STEP: ClassVar[str]
    """As the store calls a case; its module is `MODULE`."""
    MODULE: ClassVar[str]
    TITLE: ClassVar[str]
    RULES: ClassVar[tuple[str, ...]]
    """In words, for whoever reads the result."""
    CAPTION: ClassVar[str]
    """Of the table."""

    recipe: Recipe
    design: Any
    places: Places
    command: list[str] = field(default_factory=list)
    """The command line, for the result."""

    @abstractmethod
    def check(self) -> None:
        """Raises:
        ConfigError: the recipe cannot be trained as the cases are.
        """

    @property
    @abstractmethod
    def shared(self) -> tuple[str, ...]:
        """The steps of the pipeline that all cases start from."""

    @abstractmethod
    def inputs(self, made: Mapping[str, Manifest]) -> dict[str, Manifest]:
        """Of every case, from the manifests of the shared steps."""

    @abstractmethod
    def settings(self, case: Any) -> Section:
        """Of a case."""

    @abstractmethod
    def table(self, answers: Answers, told: Told) -> list[dict[str, Any]]:
        """The records of the result."""

    @staticmethod
    @abstractmethod
    def lines(result: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
        """Head and rows of the table, for a person."""

    def run(self, jobs: int, told: Any) -> dict[str, Any]:
        """Make what is missing, and write the result.

        Args:
            jobs: cases side by side.
            told: takes a line of progress.

        Raises:
            ConfigError: the recipe cannot be trained as the cases are.
            Preempted: asked to stop; the same call goes on.
            NvilaError: a step or a case failed.
        """
        self.check()
        with entered(self._here()):
            began, store = time.monotonic(), Store(self.places.store)
            made = prepare.make(self.recipe, self._parts(), self.places.ledger)
            tasks = self._tasks(made)
            missing = [task for task in tasks.values() if task.finished(store) is None]
            told(f"{len(tasks)} cases, {len(tasks) - len(missing)} of them finished; {jobs} at a time")
            work.Crew(jobs, self.places.log, told).run(missing)
            record.charge_own(self.places.ledger)
            result = self._result(made, tasks, store, time.monotonic() - began)
        write_atomic(self.places.out, json.dumps(result, indent=1) + "\n")
        write_atomic(self.places.page, page.document(self.TITLE, self._body(result)))
        return result

    def finished(self) -> dict[Any, bool]:
        """Of each case whether it is in the store."""
        self.check()
        with entered(self._here()):
            there = prepare.there(self._parts())
            if not set(self.shared) <= there.keys():
                return dict.fromkeys(self.design.runs(), False)
            store = Store(self.places.store)
            return {case: task.finished(store) is not None for case, task in self._tasks(there).items()}

    def _here(self) -> Any:
        return current().model_copy(update={"store": self.places.store, "run": self.places.runs / self.STEP})

    def _parts(self) -> list[prepare.Part]:
        return prepare.steps_to(self.recipe, *self.shared)

    def _tasks(self, made: Mapping[str, Manifest]) -> dict[Any, work.Task]:
        inputs = self.inputs(made)
        return {
            case: work.Task(self.STEP, self.MODULE, case.name, self.settings(case).model_dump(mode="json"), inputs)
            for case in self.design.runs()
        }

    def _result(
        self, made: Mapping[str, Manifest], tasks: Mapping[Any, work.Task], store: Store, seconds: float
    ) -> dict[str, Any]:
        import pyarrow.parquet as parquet

        finished = dict(zip(tasks, record.all_finished(list(tasks.values()), store), strict=True))
        answers = {case: parquet.read_table(one.path(ANSWERS_FILE)).to_pylist() for case, one in finished.items()}
        told = {case: read_json(Path(one.path(CASE_FILE))) for case, one in finished.items()}
        costs = {case: task.cost(store) for case, task in tasks.items()}
        prepared = record.costs_of(made, self.places.ledger)
        return {
            **record.provenance(self.command, self.recipe),
            "design": asdict(self.design),
            "rules": list(self.RULES),
            **record.spent([*costs.values(), *prepared.values()]),
            "seconds_of_this_call": round(seconds, 1),
            "prepared": prepared,
            "cases": [{**case.told, "key": tasks[case].key, **told[case], **costs[case]} for case in tasks],
            "table": self.table(answers, told),
        }

    def _body(self, result: Mapping[str, Any]) -> Iterator[str]:
        yield from page.header(result, self.TITLE)
        head, body = self.lines(result)
        yield page.table(self.CAPTION, head, body)
        yield from page.rules(result)


def stacked(answers: Answers, cases: Sequence[Any], source: str, column: str) -> Any:
    """(S, Q) what answers of some cases are worth, the questions in one order."""
    import numpy as np

    seeds = []
    for case in cases:
        some = {row["id"]: row[column] for row in answers[case] if row["source"] == source}
        seeds.append([some[i] for i in sorted(some)])
    return np.array(seeds, dtype=np.float64)
