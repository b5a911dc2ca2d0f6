"""The cases of the experiment: which subsets are trained on, for how long, with which seeds; which are the same."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from nvila.components.contracts.errors import ConfigError

Schedule = Literal["epoch", "steps"]
"""`epoch`: the recipe's passes over the subset, so that a smaller one is trained on for less. `steps`: for every subset
as many optimizer steps as the recipe's passes over the reference ratio make."""
SCHEDULES: tuple[Schedule, ...] = ("epoch", "steps")
ALL = "all"
"""In the place of a method: every sample."""
BASELINE = "random"
"""What the other methods are held against."""
METHODS = ("deltaloss", "multimodal-gain", "clusters", BASELINE)


@dataclass(frozen=True, order=True)
class Case:
    """One training of the pruned stages, and what it is evaluated by."""

    spoilt: bool
    """Whether a share of the answers is another sample's."""
    method: str
    ratio: float
    """Share that stays; 1 of `ALL`."""
    schedule: Schedule
    seed: int

    @property
    def name(self) -> str:
        """For people and logs."""
        spoilt = "spoilt " if self.spoilt else ""
        ratio = "" if self.method == ALL else f" {self.ratio:g}"
        return f"{spoilt}{self.method}{ratio}, {self.schedule}, seed {self.seed}"


@dataclass(frozen=True)
class Design:
    """What is compared."""

    methods: tuple[str, ...] = METHODS
    ratios: tuple[float, ...] = (0.5, 0.3, 0.1)
    seeds: int = 3
    spoilt: bool = True

    def __post_init__(self) -> None:
        _refuse(sorted(set(self.methods) - set(METHODS)), "--methods", f"There are {', '.join(METHODS)}.")
        _refuse([ratio for ratio in self.ratios if not 0 < ratio < 1], "--ratios", "A ratio lies between 0 and 1.")
        _refuse([] if self.seeds > 0 else [self.seeds], "--seeds", "One at least.")
        _refuse([] if self.methods and self.ratios else ["nothing"], "--methods, --ratios", "Name one at least.")

    @property
    def reference(self) -> float:
        """The largest ratio: its passes say how many the equal steps are."""
        return max(self.ratios)

    def rows(self) -> Iterator[Case]:
        """Every case that is told of, in the order of the table, seeds last. Some are the same run: see `run_of`."""
        for schedule in SCHEDULES:
            for ratio in (1.0, *sorted(self.ratios, reverse=True)):
                for method in (ALL,) if ratio == 1.0 else self.methods:
                    yield from (Case(False, method, ratio, schedule, seed) for seed in range(self.seeds))
        if self.spoilt:
            yield from (Case(True, ALL, 1.0, how, seed) for how in SCHEDULES for seed in range(self.seeds))
            for method in self.methods:
                yield from (Case(True, method, self.reference, "epoch", seed) for seed in range(self.seeds))

    def run_of(self, case: Case) -> Case:
        """The run that a case is read from: at the reference ratio both schedules are the same training."""
        if case.method != ALL and case.ratio == self.reference:
            return Case(case.spoilt, case.method, case.ratio, "steps", case.seed)
        return case

    def runs(self) -> list[Case]:
        """Each training once, those with the lowest seeds first: a stop half-way leaves whole tables of fewer seeds."""
        return sorted(dict.fromkeys(map(self.run_of, self.rows())), key=lambda case: (case.spoilt, case.seed))


def _refuse(wrong: Sequence[object], where: str, do: str) -> None:
    if wrong:
        raise ConfigError("not something to compare", where=where, value=wrong[0], do=do)
