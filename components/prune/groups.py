"""What belongs together: the group within which samples are ranked, and the kind of question by which references are
judged. Fitted on a stream of batches, so that no table has to fit the memory."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from zlib import crc32

from nvila.components.contracts.errors import DataError
from nvila.components.contracts.recipe.prune import FIELD, PruneSettings
from nvila.components.metrics.accuracy import normal_form

if TYPE_CHECKING:
    import numpy as np
    import pyarrow

COMMON_ANSWERS = 50
"""Of a source that are groups of their own under `answer`."""
COUNTED_ANSWERS = 100_000
"""Different ones that are counted at once; of more the rare are forgotten."""
FITTED_QUESTIONS = 50_000
"""Different ones of a source from which clusters are made."""
FIELD_VALUES = 1000
"""Different values that a field may have."""
PHRASE_WORDS = 5
PHRASE_CHARACTERS = 60
_NUMBER = re.compile(r"[+-]?[\d.,' ]*\d ?%?")

Rows = Callable[[], Iterable["pyarrow.Table"]]
"""Starts the stream of batches anew; columns source, question, answer and, where a field is asked for, fields."""


def answer_kind(answer: str) -> str:
    """`yes/no`, `number`, `word`, `phrase` (two to five words) or `text`."""
    said = normal_form(answer)
    if said in ("yes", "no"):
        return "yes/no"
    if _NUMBER.fullmatch(said):
        return "number"
    words = len(said.split())
    if words > PHRASE_WORDS or len(said) > PHRASE_CHARACTERS:
        return "text"
    return "word" if words <= 1 else "phrase"


@dataclass
class Grouping:
    """Groups and kinds of samples, by the parts that `prune.within` names."""

    within: list[str]
    _answers: dict[str, set[str]] = field(default_factory=dict)
    """By source, the commonest in normal form."""
    _questions: dict[str, Questions] = field(default_factory=dict)

    @classmethod
    def fit(cls, rows: Rows, prune: PruneSettings, seed: int) -> Grouping:
        """Find the commonest answers and the clusters of questions, and check the fields.

        Args:
            rows: the SFT samples of the step, batch by batch.
            prune: `within` and `question_clusters`.
            seed: of the clusters.

        Raises:
            DataError: a field has more values than can be groups.
        """
        found = cls(list(prune.within))
        answers: dict[str, Counter[str]] = {}
        questions: dict[str, set[str]] = {}
        values: dict[str, set[str]] = {part: set() for part in found.within if part.startswith(FIELD)}
        for batch in rows() if found.within else ():
            for source, question, answer in _columns(batch, "source", "question", "answer"):
                if "answer" in found.within:
                    counted = answers.setdefault(source, Counter())
                    counted[normal_form(answer)] += 1
                    if len(counted) > COUNTED_ANSWERS:
                        answers[source] = Counter(dict(counted.most_common(COUNTED_ANSWERS // 2)))
                if "question" in found.within:
                    questions[source] = _bounded(questions.setdefault(source, set()), question)
            for part, seen in values.items():
                seen.update(_values(batch, part))
                if len(seen) > FIELD_VALUES:
                    raise DataError(
                        f"the field {part.removeprefix(FIELD)!r} has more than {FIELD_VALUES} values",
                        where="prune.within",
                        value=sorted(seen)[:3],
                        do="Group by a field with few values, or by `question`.",
                    )
        found._answers = {source: {a for a, _ in c.most_common(COMMON_ANSWERS)} for source, c in answers.items()}
        found._questions = {
            source: Questions.fit(some, prune.question_clusters, seed) for source, some in sorted(questions.items())
        }
        return found

    def of(self, batch: pyarrow.Table) -> tuple[list[str], list[str]]:
        """Group and kind of each row of a batch of the sample table, SFT or held-out."""
        rows = list(_columns(batch, "source", "question", "answer"))
        parts = {part: self._part(part, batch, rows) for part in self.within}
        telling = [part for part in self.within if part != "answer"]
        known = parts if telling else parts | {"answer-kind": [answer_kind(answer) for _, _, answer in rows]}
        sources = [source for source, _, _ in rows]
        groups = [" / ".join(some) for some in zip(sources, *parts.values(), strict=True)]
        kinds = [
            " / ".join(some) for some in zip(sources, *(known[p] for p in telling or ["answer-kind"]), strict=True)
        ]
        return groups, kinds

    def _part(self, part: str, batch: pyarrow.Table, rows: list[tuple[str, str, str]]) -> list[str]:
        if part == "answer-kind":
            return [answer_kind(answer) for _, _, answer in rows]
        if part == "answer":
            common = ((normal_form(answer), self._answers.get(source, ())) for source, _, answer in rows)
            return [said if said in known else "other answers" for said, known in common]
        if part == "question":
            return [
                self._questions[source].of(question) if source in self._questions else ""
                for source, question, _ in rows
            ]
        return list(_values(batch, part))


@dataclass
class Questions:
    """Clusters of a source's questions: TF-IDF of words and pairs of words, k-means."""

    names: list[str]
    _own: Mapping[str, int]
    """Where there are no more questions than clusters: the place of each."""
    _vectors: Any = None
    _means: Any = None
    _known: dict[str, int] = field(default_factory=dict)

    @classmethod
    def fit(cls, questions: set[str], clusters: int, seed: int) -> Questions:
        """At most so many clusters of these different questions."""
        texts = sorted(questions)
        if len(texts) <= clusters:
            return cls([_short(text) for text in texts], {text: place for place, text in enumerate(texts)})
        from sklearn.cluster import MiniBatchKMeans
        from sklearn.feature_extraction.text import TfidfVectorizer

        # Digits and single letters tell questions apart as well as words do.
        vectors = TfidfVectorizer(
            ngram_range=(1, 2), token_pattern=r"(?u)\b\w+\b", max_features=20_000, dtype="float32"
        )
        try:
            seen = vectors.fit_transform(texts)
        except ValueError:  # no word in any of them
            return cls(["questions"], dict.fromkeys(texts, 0))
        means = MiniBatchKMeans(clusters, random_state=seed, n_init=3, batch_size=1024).fit(seen)
        return cls(_names(vectors, means.cluster_centers_, seen), {}, vectors, means)

    def of(self, question: str) -> str:
        """Name of the cluster of a question."""
        if self._means is None:
            return self.names[self._own[question]] if question in self._own else "other questions"
        place = self._known.get(question)
        if place is None:
            place = int(self._means.predict(self._vectors.transform([question]))[0])
            if len(self._known) < FITTED_QUESTIONS:
                self._known[question] = place
        return self.names[place]


def _names(vectors: Any, centres: np.ndarray, seen: Any) -> list[str]:
    """Each cluster by the words in which it differs most from all questions; numbered where two are called alike."""
    import numpy as np

    words = vectors.get_feature_names_out()
    usual = np.asarray(seen.mean(axis=0)).ravel()
    names: list[str] = []
    for centre in centres:
        telling = [words[place] for place in (centre - usual).argsort()[::-1][:3]]
        name = "question: " + ", ".join(telling)
        names.append(name if name not in names else f"{name} ({len(names)})")
    return names


def _bounded(known: set[str], question: str) -> set[str]:
    """With one more question, of at most `FITTED_QUESTIONS` (chosen by digest)."""
    known.add(question)
    if len(known) <= 2 * FITTED_QUESTIONS:
        return known
    return set(sorted(known, key=lambda text: (crc32(text.encode()), text))[:FITTED_QUESTIONS])


def _columns(batch: pyarrow.Table, *names: str) -> Iterable[Any]:
    return zip(*(batch.column(name).to_pylist() for name in names), strict=True)


def _values(batch: pyarrow.Table, part: str) -> Iterable[str]:
    """A field's value in each row, as text."""
    name = part.removeprefix(FIELD)
    if "fields" not in batch.column_names:
        return [f"no {name}"] * len(batch)
    told = (json.loads(text or "{}") for text in batch.column("fields").to_pylist())
    return [f"{name} {fields[name]}" if name in fields else f"no {name}" for fields in told]


def _short(text: str, limit: int = 60) -> str:
    return text if len(text) <= limit else f"{text[: limit - 9]}… {crc32(text.encode()):08x}"[: limit + 8]
