"""What belongs together: the group within which samples are ranked, and the kind of question by which references are
judged. Fitted on a stream of batches, so that no table has to fit the memory."""

from __future__ import annotations

import json
import re
import unicodedata
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
OTHERS = "other questions"
"""Where a question stands that is like none of its source."""
COUNTED_ANSWERS = 100_000
"""Different ones that are counted at once; of more the rare are forgotten."""
FITTED_QUESTIONS = 50_000
"""Different ones of a source from which clusters are made."""
FIELD_VALUES = 1000
"""Different values that a field may have."""
QUESTION_CHARACTERS = 1000
"""Of a question that are looked at; what follows is most often a text to read."""
PHRASE_WORDS = 5
PHRASE_CHARACTERS = 60
NAME_CHARACTERS = 60
"""Of an answer or a question in the name of its group."""
_MARKS = " .,;:!?¡¿\"'`´“”„‘’«»()[]{}*_。、"
"""What may stand around an answer without being part of it."""
_NUMBER = re.compile(r"[+-]?[.,]?\d+(?:[.,'’ ]\d+)*(?:e[+-]?\d+)? ?%?")

Rows = Callable[[], Iterable["pyarrow.Table"]]
"""Starts the stream of batches anew; columns source, question, answer and, where a field is asked for, fields."""


def answer_kind(answer: str) -> str:
    """`yes/no`, `number`, `word`, `phrase` (two to five words) or `text`."""
    said = unicodedata.normalize("NFKC", normal_form(answer)).replace("\N{MINUS SIGN}", "-").strip(_MARKS)
    if said in ("yes", "no"):
        return "yes/no"
    if _NUMBER.fullmatch(said):
        return "number"
    words = len(said.split())
    if words > PHRASE_WORDS or len(said) > PHRASE_CHARACTERS:
        return "text"
    return "word" if words <= 1 else "phrase"


def answer_name(answer: str) -> str:
    """The very answer, in normal form on one line, as groups and compositions name it: a long one by its beginning and
    a digest."""
    return _short(" ".join(normal_form(answer).split()))


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
            DataError: a field has more values than can be groups, or no sample has it.
        """
        found = cls(list(prune.within))
        answers: dict[str, Counter[str]] = {}
        questions: dict[str, set[str]] = {}
        values: dict[str, set[str]] = {part: set() for part in found.within if part.startswith(FIELD)}
        for batch in rows() if found.within else ():
            for source, question, answer in _columns(batch, "source", "question", "answer"):
                if "answer" in found.within:
                    counted = answers.setdefault(source, Counter())
                    counted[answer_name(answer)] += 1
                    if len(counted) > COUNTED_ANSWERS:
                        answers[source] = Counter(dict(counted.most_common(COUNTED_ANSWERS // 2)))
                if "question" in found.within:
                    questions[source] = _bounded(questions.setdefault(source, set()), _asked(question))
            for part, seen in values.items():
                seen.update(_values(batch, part))
                _require_few(part, seen)
        _require_known(values)
        found._answers = {source: {a for a, _ in c.most_common(COMMON_ANSWERS)} for source, c in answers.items()}
        found._questions = {
            source: Questions.fit(_chosen(some), prune.question_clusters, seed)
            for source, some in sorted(questions.items())
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
            common = ((answer_name(answer), self._answers.get(source, ())) for source, _, answer in rows)
            return [said if said in known else "other answers" for said, known in common]
        if part == "question":
            asked: dict[str, set[str]] = {}
            for source, question, _ in rows:
                asked.setdefault(source, set()).add(_asked(question))
            names = {source: self._named(source, some) for source, some in asked.items()}
            return [names[source][_asked(question)] for source, question, _ in rows]
        return list(_values(batch, part))

    def _named(self, source: str, questions: set[str]) -> dict[str, str]:
        """The cluster of each of these questions of a source."""
        return self._questions[source].of(questions) if source in self._questions else dict.fromkeys(questions, OTHERS)


@dataclass
class Questions:
    """Clusters of a source's questions: TF-IDF of words and pairs of words, k-means."""

    names: list[str]
    _own: Mapping[str, int]
    """Where there are no more questions than clusters: the place of each."""
    _vectors: Any = None
    _means: Any = None

    @classmethod
    def fit(cls, questions: set[str], clusters: int, seed: int) -> Questions:
        """At most so many clusters of these different questions."""
        texts = sorted(questions)
        if len(texts) <= clusters:
            return cls([_short(text) for text in texts], {text: place for place, text in enumerate(texts)})
        import numpy as np
        from sklearn.cluster import MiniBatchKMeans
        from sklearn.feature_extraction.text import TfidfVectorizer
        from threadpoolctl import threadpool_limits

        # Digits and single letters tell questions apart as well as words do.
        vectors = TfidfVectorizer(
            ngram_range=(1, 2), token_pattern=r"(?u)\b\w+\b", max_features=20_000, dtype=np.float32
        )
        try:
            seen = vectors.fit_transform(texts)
        except ValueError:  # no word in any of them
            return cls(["questions"], dict.fromkeys(texts, 0))
        with threadpool_limits(1):  # sums of several threads differ in their last digits
            means = MiniBatchKMeans(clusters, random_state=seed, n_init=3, batch_size=1024).fit(seen)
        return cls(_names(vectors, means.cluster_centers_, seen), {}, vectors, means)

    def of(self, questions: set[str]) -> dict[str, str]:
        """Name of the cluster of each of these different questions."""
        if self._means is None:
            return {text: self.names[self._own[text]] if text in self._own else OTHERS for text in questions}
        texts = sorted(questions)
        places = self._means.predict(self._vectors.transform(texts)) if texts else ()
        return {text: self.names[place] for text, place in zip(texts, places, strict=True)}


def _names(vectors: Any, centres: np.ndarray, seen: Any) -> list[str]:
    """Each cluster by the words in which it differs most from all questions; numbered where two are called alike."""
    import numpy as np

    words = vectors.get_feature_names_out()
    usual = np.asarray(seen.mean(axis=0)).ravel()
    names: list[str] = []
    for centre in centres:
        telling: list[str] = []
        for place in (centre - usual).argsort()[::-1][:20]:
            said = {word for one in telling for word in one.split()}
            if len(telling) < 3 and not said.intersection(words[place].split()):  # "color", "what color" say it twice
                telling.append(words[place])
        name = "question: " + ", ".join(telling)
        names.append(name if name not in names else f"{name} ({len(names)})")
    return names


def _bounded(known: set[str], question: str) -> set[str]:
    """With one more question; of more than twice `FITTED_QUESTIONS`, those that are chosen anyhow."""
    known.add(question)
    return known if len(known) <= 2 * FITTED_QUESTIONS else _chosen(known)


def _chosen(questions: set[str]) -> set[str]:
    """At most `FITTED_QUESTIONS`, by digest: the same ones in whatever order they come."""
    return set(sorted(questions, key=lambda text: (crc32(text.encode()), text))[:FITTED_QUESTIONS])


def _asked(question: str) -> str:
    """What of a question tells its cluster."""
    return unicodedata.normalize("NFC", question[:QUESTION_CHARACTERS])


def _require_few(part: str, seen: set[str]) -> None:
    if len(seen) > FIELD_VALUES:
        raise DataError(
            f"the field {part.removeprefix(FIELD)!r} has more than {FIELD_VALUES} values",
            where="prune.within",
            value=sorted(seen)[:3],
            do="Group by a field with few values, or by `question`.",
        )


def _require_known(values: Mapping[str, set[str]]) -> None:
    """A field that no sample has would part nothing, without a word."""
    for part, seen in values.items():
        name = part.removeprefix(FIELD)
        if seen == {f"no {name}"}:
            raise DataError(
                f"no sample to prune has a field {name!r}",
                where="prune.within",
                value=part,
                do="Fields are a record's own texts of up to 200 characters, numbers and true or false, beside `id`, "
                "its media and `conversations`.",
            )


def _columns(batch: pyarrow.Table, *names: str) -> Iterable[Any]:
    return zip(*(batch.column(name).to_pylist() for name in names), strict=True)


def _values(batch: pyarrow.Table, part: str) -> Iterable[str]:
    """A field's value in each row, as text."""
    name = part.removeprefix(FIELD)
    if "fields" not in batch.column_names:
        return [f"no {name}"] * len(batch)
    told = (json.loads(text or "{}") for text in batch.column("fields").to_pylist())
    return [f"{name} {_text(fields[name])}" if name in fields else f"no {name}" for fields in told]


def _text(value: str | int | float | bool) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _short(text: str) -> str:
    """The text, or where it is long its beginning with a digest of the whole."""
    return text if len(text) <= NAME_CHARACTERS else f"{text[: NAME_CHARACTERS - 10]}… {crc32(text.encode()):08x}"
