"""From the answers of all cases to the table: means, spreads, what differs from chance and from the row above."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from nvila.components.metrics.accuracy import measured
from nvila.pipelines.ablate import statistics
from nvila.pipelines.ablate.spatial_cases import SETTINGS, Case, Design
from nvila.pipelines.ablate.statistics import LEVEL, Comparison
from nvila.pipelines.ablate.trials import stacked

if TYPE_CHECKING:
    import numpy as np

MEAN = "mean"
"""In the place of a source: the mean over sources, each weighing the same."""
RULES = (
    "equal data: every row trains stages 1 to 4 on the same samples in the same order of a seed; without VEP stage 2 "
    "trains the projector alone",
    "chance is the commonest answer to the same question text in the training data, on the same questions",
    "above chance: two-sided t test of the difference to chance, its variance that over seeds plus that over questions "
    f"(Welch-Satterthwaite), p < {LEVEL} after Holm's correction over all rows and sources; of one seed: the 95% "
    "interval over questions lies above chance",
    "against the row above: the same test of the difference of two rows, Holm's correction over all rows and sources; "
    "one seed: not tested",
    "a row at chance is told as such; nothing is tuned after the first run of three seeds",
)
"""In words, for whoever reads the result."""


def table(
    design: Design, answers: Mapping[Case, Sequence[Mapping[str, Any]]], told: Mapping[Case, Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """A record per row and source, in the order of the table.

    Args:
        design: what is compared.
        answers: the answer table of each case.
        told: what each case tells of itself.
    """
    sources = list(dict.fromkeys(row["source"] for row in next(iter(answers.values()))))
    keys = [(place, source) for place in range(len(SETTINGS)) for source in sources]
    cases = [[Case(seed, place) for seed in range(design.seeds)] for place in range(len(SETTINGS))]
    worth = {(place, s): stacked(answers, cases[place], s, "worth") for place, s in keys}
    alone = {(place, s): stacked(answers, cases[place], s, "text_alone") for place, s in keys}
    chance = {key: statistics.compare(worth[key], alone[key]) for key in worth}
    above = {key: statistics.compare(worth[key], worth[key[0] - 1, key[1]]) for key in worth if key[0]}
    by_chance, by_above = _corrected(chance), _corrected(above)
    found = []
    for place, setting in enumerate(SETTINGS):
        means = []
        for source in sources:
            key = place, source
            summary = statistics.summary(worth[key])
            means.append(worth[key].mean(axis=1))
            shown = [told[Case(seed, place)]["shown"][source] for seed in range(design.seeds)]
            found.append(
                {
                    "setting": setting.name,
                    "pool": setting.pool,
                    "source": source,
                    "mean": round(summary.mean, 4),
                    "spread": round(summary.spread, 4),
                    "seeds": [round(value, 4) for value in summary.seeds],
                    "n": summary.n,
                    "tiles": round(shown[0]["tiles"], 2),
                    "tokens": round(shown[0]["tokens"], 1),
                    "chance": round(float(alone[key].mean()), 4),
                    "above_chance": _is_above(worth[key], alone[key], chance[key], by_chance.get(key)),
                    "p_chance": by_chance.get(key),
                    "difference": round(above[key].difference, 4) if place else None,
                    "p": by_above.get(key),
                    "verdict": _verdict(above[key], by_above.get(key)) if place else None,
                }
            )
        found.append(_mean(setting.name, setting.pool, means))
    return found


def _mean(name: str, pool: str, means: Sequence[np.ndarray]) -> dict[str, Any]:
    import numpy as np

    seeds = np.mean(means, axis=0)
    spread = float(np.std(seeds, ddof=1)) if len(seeds) > 1 else 0.0
    told = {
        "mean": round(float(seeds.mean()), 4),
        "spread": round(spread, 4),
        "seeds": [round(float(s), 4) for s in seeds],
    }
    return {"setting": name, "pool": pool, "source": MEAN, **told}


def _corrected(compared: Mapping[tuple[int, str], Comparison]) -> dict[tuple[int, str], float]:
    return statistics.holm({key: one.p for key, one in compared.items() if one.p is not None})


def _is_above(worth: np.ndarray, alone: np.ndarray, one: Comparison, p: float | None) -> bool:
    if p is None:
        return measured("accuracy", worth.mean(axis=0).tolist()).low > alone.mean()
    return one.difference > 0 and p < LEVEL


def _verdict(one: Comparison, p: float | None) -> statistics.Verdict:
    return statistics.verdict(one, p, p)
