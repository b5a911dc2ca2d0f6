"""Whether references can be believed: held against each other and against the question alone, per kind of question."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from nvila.components.contracts.recipe.prune import Method
from nvila.components.contracts.results.model import Judged
from nvila.components.metrics.accuracy import Z95, normal_form

LEAST_QUESTIONS = 20
"""Held-out questions of a kind; fewer prove nothing."""
CHARACTERS = 64
"""Of an answer that was never seen, each is one of so many."""
WORDS = {
    "small": "the small reference",
    "blank": "itself without the picture",
    "question_only": "the commonest answers to the same question text",
}
AGAINST: dict[Method, tuple[str, ...]] = {
    "deltaloss": ("small", "question_only"),
    "multimodal-gain": ("blank", "question_only"),
}
"""What the large reference has to beat before a method's scores are used."""


@dataclass(frozen=True)
class Heldout:
    """One held-out question, answered by the references."""

    source: str
    question: str
    answer: str
    nats: Mapping[str, float]
    """Loss of the answer, by `small`, `large`, `blank`; those that were asked."""
    right: Mapping[str, float]
    """1 where every token of the answer was the likeliest; a mean where several models of a name answered."""


@dataclass
class Count:
    """How often each of some answers was given, and how often any."""

    of: dict[str, int] = field(default_factory=dict)
    total: int = 0

    def add(self, said: str) -> None:
        """One more answer."""
        self.total += 1
        if said in self.of:
            self.of[said] += 1


class Commonest:
    """Answers counted by question text: what can be known without looking.

    Only answers that are asked for are counted, so that its size is that of the held-out questions.
    """

    def __init__(self, asked: Iterable[tuple[str, str, str]]) -> None:
        """`asked` are source, question and answer of the held-out questions."""
        self._by_question: dict[tuple[str, str], Count] = {}
        self._by_source: dict[str, Count] = {}
        for source, question, answer in asked:
            said = normal_form(answer)
            self._by_question.setdefault((source, question), Count()).of[said] = 0
            self._by_source.setdefault(source, Count()).of[said] = 0

    def count(self, rows: Iterable[tuple[str, str, str]]) -> None:
        """Add training samples: source, question, answer."""
        for source, question, answer in rows:
            said = normal_form(answer)
            if source in self._by_source:
                self._by_source[source].add(said)
            if (source, question) in self._by_question:
                self._by_question[source, question].add(said)

    def nats(self, source: str, question: str, answer: str) -> float:
        """-log of the share of training samples with this very question that have this answer; the source's shares
        count as one sample more, and an answer that was never seen is spelt by chance."""
        said, nothing = normal_form(answer), Count()
        known, of_source = self._by_question.get((source, question), nothing), self._by_source.get(source, nothing)
        total, seen, seen_in_source = of_source.total + 1, known.of.get(said, 0), of_source.of.get(said, 0)
        spelt = len(said) * math.log(CHARACTERS)
        log_prior = math.log(seen_in_source / total) if seen_in_source else -math.log(total) - spelt
        return math.log(known.total + 1) - (math.log(seen + math.exp(log_prior)) if seen else log_prior)


def judge(asked: Mapping[str, Sequence[Heldout]], commonest: Commonest, method: Method) -> dict[str, Judged]:
    """By kind of question.

    The large reference is believed where its loss is lower, question by question, than that of everything which the
    method is held against, by more than the 95% interval of the mean difference.

    Args:
        asked: held-out questions by kind.
        commonest: the answers of the training samples.
        method: says what has to be beaten.
    """
    return {kind: _judged(questions, commonest, method) for kind, questions in sorted(asked.items())}


def believed(judged: Judged, method: Method) -> bool:
    """Whether a method's scores say something of this kind of question."""
    beaten = (judged.against.get(name, -math.inf) > 0 for name in AGAINST.get(method, ()))
    return judged.n >= LEAST_QUESTIONS and all(beaten)


def _judged(questions: Sequence[Heldout], commonest: Commonest, method: Method) -> Judged:
    names = sorted({name for question in questions for name in question.nats})
    nats = {name: [question.nats[name] for question in questions] for name in names}
    nats["question_only"] = [commonest.nats(q.source, q.question, q.answer) for q in questions]
    large = nats.get("large", [])  # none where no question could be asked
    against = {name: _lower(values, large) for name, values in nats.items() if large and name != "large"}
    told = Judged(
        n=len(questions),
        loss={name: round(sum(values) / max(1, len(values)), 4) for name, values in nats.items()},
        accuracy={
            name: round(sum(question.right[name] for question in questions) / max(1, len(questions)), 4)
            for name in names
        },
        against=against,
        trusted=True,
        why="",
    )
    return told if believed(told, method) else told.model_copy(update={"trusted": False, "why": _why(told, method)})


def _why(told: Judged, method: Method) -> str:
    if told.n < LEAST_QUESTIONS:
        return f"only {told.n} held-out questions, {LEAST_QUESTIONS} are needed"
    unbeaten = [WORDS[name] for name in AGAINST.get(method, ()) if told.against.get(name, -math.inf) <= 0]
    return f"the large reference is not better than {' nor than '.join(unbeaten)}"


def _lower(other: Sequence[float], large: Sequence[float]) -> float:
    """Lower end of the 95% interval of the mean of `other - large`."""
    differences = [a - b for a, b in zip(other, large, strict=True)]
    n = len(differences)
    if n < 2:
        return -1.0
    mean = sum(differences) / n
    variance = sum((value - mean) ** 2 for value in differences) / (n - 1)
    return round(mean - Z95 * math.sqrt(variance / n), 4)
