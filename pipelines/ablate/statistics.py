"""Means, spreads and the test by which a method counts as better than chance. The rules are fixed here, before a run.

A case is trained with several seeds and asked the same questions each time, so an accuracy is uncertain twice: another
seed would train another model, and other questions would be asked. Of a method and the baseline on one source and kind
of question the difference of the mean accuracies has the variance

    s^2 * 2 / S   +   v / Q

where s^2 is the variance over the S seeds pooled over the two, and v the variance over the Q questions of the paired
difference (each question's worth averaged over seeds: method less baseline). t is the difference by its root, with
Welch and Satterthwaite's degrees of freedom of the two parts (2S - 2 and Q - 1). What seeds and questions do together
is in both parts, so that the test errs to the side of "no difference". A single seed proves nothing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeVar

if TYPE_CHECKING:
    import numpy as np

LEVEL = 0.05
K = TypeVar("K")
Verdict = Literal["better", "below", "no difference beyond noise", "not tested"]
RULES = (
    "two-sided t test of the difference of mean accuracies on the same questions; its variance is that over seeds, "
    "pooled over the two, plus that over questions of the paired difference; Satterthwaite's degrees of freedom",
    f"better: above {{baseline}}, and p < {LEVEL} after Holm's correction over all methods, sources and kinds of one "
    "keep ratio and schedule",
    f"below: under {{baseline}}, and p < {LEVEL} after Holm's correction over the sources and kinds of this one "
    "method, keep ratio and schedule: harm counts earlier than gain",
    "one seed: not tested",
)
"""In words, for whoever reads the result."""


@dataclass(frozen=True)
class Summary:
    """Accuracy of one case on questions of one kind."""

    mean: float
    spread: float
    """Standard deviation over seeds; 0 of a single one."""
    seeds: tuple[float, ...]
    n: int
    """Questions."""


@dataclass(frozen=True)
class Comparison:
    """A method against the baseline."""

    difference: float
    error: float
    """Standard error of the difference."""
    p: float | None
    """None where it was not tested."""


def summary(worth: np.ndarray) -> Summary:
    """Of (S, Q) what each answer is worth, by seed and question."""
    import numpy as np

    seeds = worth.mean(axis=1)
    spread = float(np.std(seeds, ddof=1)) if len(seeds) > 1 else 0.0
    return Summary(float(seeds.mean()), spread, tuple(map(float, seeds)), worth.shape[1])


def compare(method: np.ndarray, baseline: np.ndarray) -> Comparison:
    """Test two (S, Q) arrays of the same questions in the same order; see the module."""
    import numpy as np
    from scipy.stats import t as student

    seeds, questions = method.shape
    if baseline.shape != method.shape:
        raise ValueError(f"not the same seeds and questions: {method.shape} and {baseline.shape}")
    difference = float(method.mean() - baseline.mean())
    if seeds < 2 or questions < 2:
        return Comparison(difference, math.nan, None)
    over_seeds = float((np.var(method.mean(1), ddof=1) + np.var(baseline.mean(1), ddof=1)) / seeds)
    # Few questions may all differ alike, and are no proof: half of one might have been answered otherwise.
    over_questions = max(float(np.var(method.mean(0) - baseline.mean(0), ddof=1)), 0.25 / questions) / questions
    variance = over_seeds + over_questions
    freedom = variance**2 / (over_seeds**2 / (2 * seeds - 2) + over_questions**2 / (questions - 1))
    error = math.sqrt(variance)
    return Comparison(difference, error, float(2 * student.sf(abs(difference) / error, freedom)))


def holm(p: Mapping[K, float]) -> dict[K, float]:
    """p-values corrected for their number by Holm's step-down method."""
    found, least = dict[K, float](), 0.0
    for rank, key in enumerate(sorted(p, key=lambda key: p[key])):
        least = max(least, min(1.0, p[key] * (len(p) - rank)))
        found[key] = least
    return found


def verdict(one: Comparison, p_gain: float | None, p_harm: float | None) -> Verdict:
    """By the rules above; the two are p after either correction."""
    if one.p is None or p_gain is None or p_harm is None:
        return "not tested"
    if one.difference > 0 and p_gain < LEVEL:
        return "better"
    return "below" if one.difference < 0 and p_harm < LEVEL else "no difference beyond noise"
