"""How answers are scored, the interval of a value, and the baselines that never look at the picture."""

from __future__ import annotations

import math
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence

from nvila.components.contracts.metrics import Metric
from nvila.components.contracts.results.result import Measured
from nvila.components.data.samples import Sample
from nvila.components.model.text.controls import BREAK

Z95 = 1.959964


def normal_form(answer: str) -> str:
    """What exact match compares: lower case in Unicode's form NFC, outer white space and a final full stop dropped.

    One sign has several spellings ("é" as one character, or as "e" with an accent); the zero-width space that keeps a
    control string in a text from being read as one is no part of the answer.
    """
    composed = unicodedata.normalize("NFC", answer.replace(BREAK, ""))
    return unicodedata.normalize("NFC", composed.strip().rstrip(".").lower())


def is_correct(prediction: str, answer: str) -> bool:
    """Exact match in normal form."""
    return normal_form(prediction) == normal_form(answer)


SCORES: dict[Metric, Callable[[str, str], float]] = {"accuracy": is_correct}
"""By metric: what a prediction is worth beside the answer, from 0 (wrong) to 1 (right)."""


def scores(metric: Metric, predictions: Iterable[str], answers: Iterable[str]) -> list[float]:
    """What each prediction is worth."""
    return [SCORES[metric](said, answer) for said, answer in zip(predictions, answers, strict=True)]


def measured(metric: Metric, worth: Sequence[float]) -> Measured:
    """Mean worth of answers with the Wilson score interval (95%).

    Shares vary less than a right and wrong of the same mean: for them the interval is wide enough, and rather wider.
    """
    n = len(worth)
    if n == 0:
        return Measured(metric=metric, value=0.0, low=0.0, high=1.0, n=0)
    p = sum(worth) / n
    centre = (p + Z95**2 / (2 * n)) / (1 + Z95**2 / n)
    half = Z95 / (1 + Z95**2 / n) * math.sqrt(p * (1 - p) / n + Z95**2 / (4 * n**2))
    low, high = max(0.0, centre - half), min(1.0, centre + half)
    return Measured(metric=metric, value=round(p, 4), low=round(low, 4), high=round(high, 4), n=n)


def fall(before: Sequence[float], after: Sequence[float]) -> tuple[float, float]:
    """How far the mean worth fell on the same questions, and how much farther the fall may be in truth.

    The sum of the two is the upper end of a 95% interval: Tango's score interval of a paired difference (Statistics in
    Medicine 17, 1998), with a continuity correction, so that it is not too narrow with few questions either. It is not
    empty where both models are right and wrong on the same questions; no questions say nothing (0 and 1).

    Args:
        before: what each answer of the first model is worth; right or wrong, or a share, as for `measured`.
        after: the same questions, second model.
    """
    from scipy.optimize import brentq

    n = len(before)
    if n == 0:
        return 0.0, 1.0
    lost = sum(max(b - a, 0) for b, a in zip(before, after, strict=True))
    won = sum(max(a - b, 0) for b, a in zip(before, after, strict=True))

    def room(delta: float) -> float:
        """How far what was seen is from what a fall of `delta` would rule out; 0 at the end of the interval."""
        half = -lost - won + (2 * n - lost + won) * delta
        likeliest = (math.sqrt(half**2 + 8 * n * won * delta * (1 - delta)) - half) / (4 * n)  # share of won
        return lost - won + 1 - n * delta + Z95 * math.sqrt(max(0.0, n * (2 * likeliest + delta - delta**2)))

    difference = (lost - won) / n
    return difference, float(1.0 if room(1.0) >= 0 else brentq(room, difference, 1.0)) - difference


def fall_interval(before: Sequence[float], after: Sequence[float]) -> tuple[float, float, float]:
    """How far the mean worth fell on the same questions, and the ends of its 95% interval (`fall`)."""
    difference, more = fall(before, after)
    return difference, difference - fall(after, before)[1], difference + more


def fall_without_loss(n: int) -> float:
    """The upper end of that interval where both models are right and wrong on the same n questions: no gate can be told
    a smaller one by so few."""
    if n == 0:
        return 1.0
    first, second = n**2 + Z95**2 * n, 2 * n + Z95**2 * n  # the square of `room` at its end, by powers of the fall
    return min(1.0, (second + math.sqrt(second**2 - 4 * first)) / (2 * first))


class QuestionOnly:
    """Answers from the question alone: the most common training answer per question text, else of the source.

    Answers are counted, and given, in their normal form; a question is the same in whatever form of Unicode it is.
    """

    def __init__(self, train: Iterable[Sample]) -> None:
        by_question: dict[tuple[str, str], Counter[str]] = defaultdict(Counter)
        by_source: dict[str, Counter[str]] = defaultdict(Counter)
        for sample in train:
            answer = normal_form(sample.answer)
            by_question[_asked(sample)][answer] += 1
            by_source[sample.source][answer] += 1
        self._answer = {key: count.most_common(1)[0][0] for key, count in by_question.items()}
        self._majority = {source: count.most_common(1)[0][0] for source, count in by_source.items()}

    def majority(self, source: str) -> str:
        """The most common training answer of a source."""
        return self._majority.get(source, "")

    def answer(self, sample: Sample) -> str:
        """The most common training answer to this very question text."""
        return self._answer.get(_asked(sample), self.majority(sample.source))


def _asked(sample: Sample) -> tuple[str, str]:
    return sample.source, unicodedata.normalize("NFC", sample.question)
