"""The held-out questions on which references are judged: chosen per kind, and put together from all who answered."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any
from zlib import crc32

from nvila.components.data.samples import Sample, read_limits, sample_batches, samples_of
from nvila.components.prune import work
from nvila.components.prune.judge import Commonest, Heldout

if TYPE_CHECKING:
    import pyarrow

    from nvila.components.prune.groups import Grouping

Told = Mapping[str, Mapping[str, tuple[float, bool]]]
"""By reference, by sample id: nats, and whether it was right."""


def questions(job: work.Job, grouping: Grouping) -> dict[str, list[Sample]]:
    """By kind of question at most `heldout_questions`, chosen by a digest of their ids; no more are held.

    Of a conversation the first question is asked: it is what the kind and the commonest answers are of.
    """
    limits, most = read_limits(job.samples), job.prune.heldout_questions
    found: dict[str, list[Sample]] = defaultdict(list)
    for rows in sample_batches(job.samples, work.SHARD_SAMPLES, split="heldout", sources=job.sources):
        _, kinds = grouping.of(rows)
        for kind, sample in zip(kinds, samples_of(rows, limits), strict=True):
            found[kind].append(replace(sample, conversations=sample.conversations[:2]))
        found = defaultdict(list, {kind: sorted(some, key=_place)[:most] for kind, some in found.items()})
    return dict(sorted(found.items()))


def answered(asked: Mapping[str, Sequence[Sample]], told: Sequence[Told]) -> dict[str, list[Heldout]]:
    """The questions of each kind with what all references said of them; where models of several folds answered, their
    mean. Questions that one of them could not use are left out."""
    names = {name for one in told for name in one}
    said: dict[tuple[str, str], list[tuple[float, bool]]] = defaultdict(list)
    for one in told:
        for name, answers in one.items():
            for sample, answer in answers.items():
                said[name, sample].append(answer)
    return {
        kind: [
            Heldout(
                sample.source,
                sample.question,
                sample.answer,
                {name: _mean([nats for nats, _ in said[name, sample.id]]) for name in names},
                {name: _mean([float(right) for _, right in said[name, sample.id]]) for name in names},
            )
            for sample in samples
            if all(said[name, sample.id] for name in names)
        ]
        for kind, samples in asked.items()
    }


def commonest(rows: Iterable[pyarrow.Table], asked: Iterable[Sample]) -> Commonest:
    """The answers of the training samples `rows` to the questions that were asked."""
    found = Commonest((sample.source, sample.question, sample.answer) for sample in asked)
    for batch in rows:
        columns: list[Any] = [batch.column(name).to_pylist() for name in ("source", "question", "answer")]
        found.count(zip(*columns, strict=True))
    return found


def _place(sample: Sample) -> int:
    return crc32(sample.id.encode())


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
