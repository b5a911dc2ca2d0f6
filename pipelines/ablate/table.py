"""From the answers of all cases to the table: means, spreads and verdicts per source and kind of question."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from nvila.pipelines.ablate import statistics
from nvila.pipelines.ablate.cases import ALL, BASELINE, Case, Design
from nvila.pipelines.ablate.statistics import Comparison

if TYPE_CHECKING:
    import numpy as np

EVERY = "all kinds"
"""In the place of a kind: all questions of a source that has several kinds."""
Questions = tuple[str, str, str]
"""Stage, source, kind."""
Answers = Mapping[Questions, Mapping[str, float]]
"""What each answer of one case is worth, by the question's id."""


@dataclass(frozen=True)
class Row:
    """One case over all seeds, on the questions of one kind after one stage."""

    spoilt: bool
    stage: str
    schedule: str
    method: str
    ratio: float
    source: str
    kind: str
    mean: float
    spread: float
    """Standard deviation over seeds."""
    seeds: tuple[float, ...]
    n: int
    """Questions."""
    difference: float | None = None
    """To the baseline at the same ratio and schedule; None where there is none."""
    error: float | None = None
    p: float | None = None
    p_gain: float | None = None
    """Corrected for all methods, sources and kinds of this ratio and schedule."""
    p_harm: float | None = None
    """Corrected for the sources and kinds of this method, ratio and schedule."""
    verdict: str | None = None

    @property
    def json(self) -> dict[str, Any]:
        """As it is written, rounded to what can be told."""
        return {name: _rounded(name, value) for name, value in asdict(self).items()}


def answers_of(rows: Sequence[Mapping[str, Any]]) -> Answers:
    """Of the answer table of one case."""
    found: dict[Questions, dict[str, float]] = defaultdict(dict)
    kinds: dict[str, set[str]] = defaultdict(set)
    for row in rows:
        found[row["stage"], row["source"], row["kind"]][row["id"]] = row["worth"]
        kinds[row["source"]].add(row["kind"])
    for row in rows:
        if len(kinds[row["source"]]) > 1:
            found[row["stage"], row["source"], EVERY][row["id"]] = row["worth"]
    return found


def table(design: Design, answers: Mapping[Case, Answers]) -> list[Row]:
    """Every row, in the order of the design. `answers` holds each run (see `Design.run_of`)."""
    together: dict[Case, dict[Questions, np.ndarray]] = {}
    for case in design.rows():
        if case.seed == 0:
            seeds = [answers[design.run_of(_seeded(case, seed))] for seed in range(design.seeds)]
            together[case] = {of: _stacked([one[of] for one in seeds]) for of in seeds[0]}
    compared = {
        (case, of): statistics.compare(worth, together[_baseline(case)][of])
        for case, every in together.items()
        if case.method not in (ALL, BASELINE) and _baseline(case) in together
        for of, worth in every.items()
    }
    gain = _corrected(compared, lambda case, of: (case.spoilt, case.schedule, case.ratio, of[0]))
    harm = _corrected(compared, lambda case, of: (case.spoilt, case.schedule, case.ratio, of[0], case.method))
    return [
        _row(case, of, worth, compared.get((case, of)), gain.get((case, of)), harm.get((case, of)))
        for case, every in together.items()
        for of, worth in sorted(every.items())
    ]


def _row(
    case: Case, of: Questions, worth: np.ndarray, one: Comparison | None, p_gain: float | None, p_harm: float | None
) -> Row:
    told = statistics.summary(worth)
    row = Row(case.spoilt, of[0], case.schedule, case.method, case.ratio, of[1], of[2], **asdict(told))
    if one is None:
        return row
    found = {"difference": one.difference, "error": one.error if one.p is not None else None, "p": one.p}
    said = statistics.verdict(one, p_gain, p_harm)
    return Row(**{**asdict(row), **found, "p_gain": p_gain, "p_harm": p_harm, "verdict": said})


def _corrected(
    compared: Mapping[tuple[Case, Questions], Comparison], family: Any
) -> dict[tuple[Case, Questions], float]:
    families: dict[Any, dict[tuple[Case, Questions], float]] = defaultdict(dict)
    for key, one in compared.items():
        if one.p is not None:
            families[family(*key)][key] = one.p
    return {key: p for some in families.values() for key, p in statistics.holm(some).items()}


def _baseline(case: Case) -> Case:
    return Case(case.spoilt, BASELINE, case.ratio, case.schedule, case.seed)


def _seeded(case: Case, seed: int) -> Case:
    return Case(case.spoilt, case.method, case.ratio, case.schedule, seed)


def _stacked(seeds: Sequence[Mapping[str, float]]) -> np.ndarray:
    """(S, Q), the questions in one order."""
    import numpy as np

    ids = sorted(seeds[0])
    return np.array([[one[i] for i in ids] for one in seeds], dtype=np.float64)


def _rounded(name: str, value: Any) -> Any:
    if isinstance(value, tuple):
        return [round(one, 4) for one in value]
    if isinstance(value, float):
        return float(f"{value:.3g}") if name.startswith("p") else round(value, 4)
    return value
