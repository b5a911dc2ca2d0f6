"""From the answers of all cases to the table: accuracy at ratio 1 and at the best ratio, memory, and speed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from nvila.pipelines.ablate import statistics
from nvila.pipelines.ablate.ratio_cases import SETTINGS, Case, Design
from nvila.pipelines.ablate.statistics import LEVEL
from nvila.pipelines.ablate.trials import Answers, Told, stacked

RULES = (
    "one model, made once, is tuned by every row at every ratio on the same samples; seeds are those of the order of "
    "samples and of the adapters' first weights",
    "the language model's rate is the recipe's where it learns by adapters and `--full-rate` where it learns in full; "
    "the projector learns at the language model's rate, the tower at the ratio's share of it",
    "the best ratio is that with the highest mean over seeds on the very questions that are shown: of four it is the "
    "luckiest too",
    "a ratio against ratio 1 of its row: two-sided t test of the difference on the same questions, its variance that "
    "over seeds plus that over questions (Welch-Satterthwaite), p < "
    f"{LEVEL} after Holm's correction over all rows, ratios and sources; one seed: not tested",
    "nothing is tuned after the first run of three seeds",
)
"""In words, for whoever reads the result."""


def table(design: Design, answers: Answers, told: Told, memory: Mapping[str, int]) -> list[dict[str, Any]]:
    """A record per row, ratio and source.

    Args:
        design: what is compared.
        answers: the answer table of each case.
        told: what each case tells of itself.
        memory: bytes of each row's weights, states and activations, by the plan's formula.
    """
    sources = list(dict.fromkeys(row["source"] for row in next(iter(answers.values()))))
    places = [(place, ratio) for place, setting in enumerate(SETTINGS) for ratio in setting.ratios]
    cases = {at: [Case(seed, *at) for seed in range(design.seeds)] for at in places}
    worth = {(at, s): stacked(answers, cases[at], s, "worth") for at in places for s in sources}
    against = {(at, s): statistics.compare(worth[at, s], worth[(at[0], 1.0), s]) for at, s in worth if at[1] != 1}
    p = statistics.holm({key: one.p for key, one in against.items() if one.p is not None})
    found = []
    for at, source in worth:
        summary, one = statistics.summary(worth[at, source]), against.get((at, source))
        corrected = p.get((at, source))
        found.append(
            {
                "setting": SETTINGS[at[0]].name,
                "ratio": at[1],
                "source": source,
                "mean": round(summary.mean, 4),
                "spread": round(summary.spread, 4),
                "seeds": [round(value, 4) for value in summary.seeds],
                "n": summary.n,
                "difference": round(one.difference, 4) if one else None,
                "p": corrected,
                "verdict": statistics.verdict(one, corrected, corrected) if one else None,
                "bytes": memory[SETTINGS[at[0]].name],
                "steps_per_second": _speed([told[case]["steps_per_second"] for case in cases[at]]),
            }
        )
    return found


def _speed(told: Sequence[float | None]) -> float | None:
    known = [one for one in told if one]
    return round(median(known), 3) if known else None
