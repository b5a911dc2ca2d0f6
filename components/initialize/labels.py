"""What a tower made from scratch learns to see: `labels.json`; without it, what the training texts say of a picture."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from itertools import pairwise

from nvila.components.contracts.errors import DataError
from nvila.components.contracts.manifest import Manifest
from nvila.components.data.samples import LABELS_FILE, SAMPLES_FILE, Label, Sample, read_labels, read_samples

MIN_RECORDS = 20
"""So that some are held back, and some are left."""
MAX_LABELS = 1000
"""Of those that texts give, the commonest."""
COMMON = 0.5
"""A word of more than this share of the texts tells pictures apart no better than chance."""
SHORT_WORDS = 3
"""An answer of so few words names a class."""

_WORD = re.compile(r"\w+")
_MARKER = re.compile(r"<image>")


def tower_labels(samples: Manifest) -> tuple[list[Label], str]:
    """The label records of all sources, and what they are made of.

    Only where no source brings labels do texts of pictures stand in: the words of captions and, where there are no
    captions either, the short answers to questions that have several, and the words of longer ones.

    Raises:
        DataError: there are too few of all of them.
    """
    found = read_labels(samples.path(LABELS_FILE))
    if found:
        return _enough(found, samples, "labels.json"), "labels"
    for split, made_of in (("captions", "words of captions"), ("sft", "answers")):
        told = list(read_samples(samples.path(SAMPLES_FILE), split=split))
        found = _from_texts([one for one in told if one.kind == "image" and len(one.media) == 1])
        if len(found) >= MIN_RECORDS:
            return found, made_of
    return _enough(found, samples, "labels.json, captions, or answers about pictures"), "answers"


def _enough(labels: list[Label], samples: Manifest, kinds: str) -> list[Label]:
    if len(labels) >= MIN_RECORDS:
        return labels
    raise DataError(
        f"a vision tower made from scratch learns from at least {MIN_RECORDS} pictures with {kinds}",
        where=str(samples.path(LABELS_FILE)),
        value=len(labels),
        do="Add them to a source, or name trained weights in model.base.vision_tower and model.base.llm.",
    )


def _from_texts(samples: list[Sample]) -> list[Label]:
    """One record a picture, in the order of the table: all that its samples say."""
    answered: dict[str, set[str]] = defaultdict(set)
    for sample in samples:
        for question, answer in _closed(sample):
            answered[question].add(answer)
    said: dict[tuple[str, str], set[str]] = defaultdict(set)
    of: dict[tuple[str, str], Sample] = {}
    for sample in samples:
        key = (sample.source, sample.media[0])
        of.setdefault(key, sample)
        classes = {
            f"{question} {'_'.join(answer.split())}"
            for question, answer in _closed(sample)
            if len(answered[question]) > 1
        }
        said[key] |= classes or set(_words(turn.text for turn in sample.conversations if turn.role == "gpt"))
    counts = Counter(label for labels in said.values() for label in labels)
    kept = {
        label
        for label, count in counts.most_common(MAX_LABELS)
        if " " in label or 2 <= count <= max(2, COMMON * len(said))
    }
    return [
        Label(one.source, one.root, one.media[0], None, None, labels, one.limits, next(iter(one.media_sha256), None))
        for key, one in of.items()
        if (labels := tuple(sorted(said[key] & kept)))
    ]


def _closed(sample: Sample) -> Iterator[tuple[str, str]]:
    """Questions of the conversation with answers so short that they name a class, both without regard to case."""
    for asked, answered in pairwise(sample.conversations):
        if (asked.role, answered.role) != ("human", "gpt"):
            continue
        answer = answered.text.casefold().strip().removesuffix(".")
        question = " ".join(_MARKER.sub("", asked.text).casefold().split())
        if question and 1 <= len(answer.split()) <= SHORT_WORDS:
            yield question, answer


def _words(texts: Iterable[str]) -> Iterator[str]:
    for text in texts:
        yield from (word for word in _WORD.findall(text.casefold()) if len(word) > 1)
