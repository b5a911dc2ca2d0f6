"""Losses by references that vLLM runs (`engine: vllm`), read off its `prompt_logprobs`.

vLLM takes most of a minute to start, so it is given many shards at once; what it has answered is kept by itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nvila.components.contracts.errors import DataError
from nvila.components.data.samples import Sample, read_limits, sample_batches, samples_of
from nvila.components.data.skipped import Skipped
from nvila.components.prune.decide import BLANK
from nvila.components.prune.work import SHARD_SAMPLES, Job

if TYPE_CHECKING:
    import numpy as np

    from nvila.components.serve.batch import Score

SHARDS_AT_ONCE = 16
Scores = dict[str, "Score"]
"""By sample id."""


def answer(job: Job, samples: Sequence[Sample]) -> dict[str, dict[str, tuple[float, bool]]]:
    """Losses of held-out questions by reference and id, of the large one without the picture too."""
    found = _all(job, samples, blank=True)[0]
    return {name: {one: (score.nats, score.right) for one, score in scores.items()} for name, scores in found.items()}


def score(job: Job, believed: np.ndarray) -> Iterator[dict[str, Any]]:
    """Losses of the samples, shard by shard, as `work.read_shard` gives them.

    Args:
        job: of the step.
        believed: (n,) bool, the samples that are to be scored.
    """
    limits, at = read_limits(job.samples), 0
    waiting: list[tuple[list[Sample], list[Sample]]] = []
    for rows in sample_batches(job.samples, SHARD_SAMPLES, split="sft", sources=job.sources):
        some = samples_of(rows, limits)
        waiting.append((some, [one for one, fine in zip(some, believed[at : at + len(some)], strict=True) if fine]))
        at += len(some)
        if len(waiting) == SHARDS_AT_ONCE:
            yield from _shards(job, waiting)
            waiting = []
    yield from _shards(job, waiting)


def _shards(job: Job, waiting: Sequence[tuple[list[Sample], list[Sample]]]) -> Iterator[dict[str, Any]]:
    found, skipped = _all(job, [one for _, wanted in waiting for one in wanted], blank=job.prune.blank)
    for _, wanted in waiting:
        ids = {one.id for one in wanted}
        yield {
            "losses": {
                name: {i: (s.nats, s.tokens) for i, s in scores.items() if i in ids} for name, scores in found.items()
            },
            "skipped": [[one.id, one.reason, one.where] for one in skipped if one.id in ids],
            "clusters": {},
        }


def _all(job: Job, samples: Sequence[Sample], *, blank: bool) -> tuple[dict[str, Scores], list[Skipped]]:
    """Of every reference that vLLM runs; samples that one of them cannot use."""
    found: dict[str, Scores] = {}
    skipped: list[Skipped] = []
    for name, folder in job.served.items():
        names = {name: False, BLANK: True} if blank and name == "large" else {name: False}
        told, left_out = _losses(folder, samples, job.folder / "vllm", names)
        found |= told
        skipped += left_out
    return found, skipped


def _losses(
    folder: Path, samples: Sequence[Sample], work: Path, names: Mapping[str, bool]
) -> tuple[dict[str, Scores], list[Skipped]]:
    """By name, which says whether the picture is hidden: all in one start of vLLM."""
    from nvila.components.serve.batch import Conversation, score_with_vllm

    asked, skipped = [], []
    for sample in samples:
        try:
            asked += [(name, sample.id, Conversation.of(sample, blank=hidden)) for name, hidden in names.items()]
        except DataError as error:
            skipped.append(Skipped.of(sample.id, error))
    told = score_with_vllm(folder, [conversation for *_, conversation in asked], work=work)
    found: dict[str, Scores] = {name: {} for name in names}
    for (name, one, _), score in zip(asked, told, strict=True):
        if score is None:
            skipped.append(Skipped(one, "vLLM gave it no loss"))
        else:
            found[name][one] = score
    return found, skipped
