"""Exact match, its interval, and the baselines that never look at the picture."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from typing import TypedDict

from nvila.components.data.samples import Sample

Z95 = 1.959964


class Accuracy(TypedDict):
    """Share of right answers with its 95% interval."""

    accuracy: float
    low: float
    high: float
    n: int


def normal_form(answer: str) -> str:
    """What exact match compares: lower case, outer white space and a final full stop dropped."""
    return answer.strip().rstrip(".").lower()


def is_correct(prediction: str, answer: str) -> bool:
    """Exact match in normal form."""
    return normal_form(prediction) == normal_form(answer)


def accuracy(correct: Sequence[bool]) -> Accuracy:
    """Share of right answers with the Wilson score interval (95%)."""
    n = len(correct)
    if n == 0:
        return {"accuracy": 0.0, "low": 0.0, "high": 1.0, "n": 0}
    p = sum(correct) / n
    centre = (p + Z95**2 / (2 * n)) / (1 + Z95**2 / n)
    half = Z95 / (1 + Z95**2 / n) * math.sqrt(p * (1 - p) / n + Z95**2 / (4 * n**2))
    return {
        "accuracy": round(p, 4),
        "low": round(max(0.0, centre - half), 4),
        "high": round(min(1.0, centre + half), 4),
        "n": n,
    }


def fall(before: Sequence[bool], after: Sequence[bool]) -> tuple[float, float]:
    """How far accuracy fell on the same questions, and the 95% half width of that difference (paired, McNemar).

    Args:
        before: right or wrong of each question, first model.
        after: the same questions, second model.
    """
    n = len(before)
    lost = sum(b and not a for b, a in zip(before, after, strict=True))
    won = sum(a and not b for b, a in zip(before, after, strict=True))
    difference = (lost - won) / n
    return difference, Z95 * math.sqrt(max(0.0, (lost + won) / n - difference**2) / n)


class QuestionOnly:
    """Answers from the question alone: the most common training answer per question text, else of the source."""

    def __init__(self, train: Iterable[Sample]) -> None:
        by_question: dict[tuple[str, str], Counter[str]] = defaultdict(Counter)
        by_source: dict[str, Counter[str]] = defaultdict(Counter)
        for sample in train:
            by_question[sample.source, sample.question][sample.answer] += 1
            by_source[sample.source][sample.answer] += 1
        self._answer = {key: count.most_common(1)[0][0] for key, count in by_question.items()}
        self._majority = {source: count.most_common(1)[0][0] for source, count in by_source.items()}

    def majority(self, source: str) -> str:
        """The most common training answer of a source."""
        return self._majority.get(source, "")

    def answer(self, sample: Sample) -> str:
        """The most common training answer to this very question text."""
        return self._answer.get((sample.source, sample.question), self.majority(sample.source))
