"""The pinned prompts: held-out questions whose answers the evaluation has on record, always the same for one model."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

from nvila.components.contracts.manifest import Manifest
from nvila.components.data.samples import Sample, read_samples
from nvila.components.model.text.conversation import File, Part, messages_of


@dataclass(frozen=True)
class Pinned:
    """A question, what the evaluated model said, and the truth."""

    id: str
    question: tuple[Part[File], ...]
    """Texts and media in the record's order, as they were evaluated."""
    expected: str
    answer: str


def choose(metrics: Manifest, samples: Manifest, count: int) -> list[Pinned]:
    """`count` prompts (or as many as were answered), the sources in turn, by the digest of their id.

    Args:
        metrics: of evaluate-quantized, with `predictions.parquet`.
        samples: of validate, with `samples.parquet`.
        count: the policy's `pinned_prompts`.
    """
    import pyarrow.parquet as parquet

    columns = ["id", "source", "prediction", "answer"]
    rows = parquet.read_table(metrics.path("predictions.parquet", fresh=True), columns=columns).to_pylist()
    rows = [row for row in rows if row["prediction"]]  # a question too long for the model has none, and no server's
    rows.sort(key=lambda row: _order(row["id"]))
    sources = sorted({row["source"] for row in rows})
    turns = zip_longest(*([row for row in rows if row["source"] == source] for source in sources))
    chosen = [row for turn in turns for row in turn if row is not None][:count]
    table = samples.path("samples.parquet", fresh=True)
    by_id = {s.id: s for s in read_samples(table, ids=[row["id"] for row in chosen])}
    return [_pinned(row, by_id[row["id"]]) for row in chosen]


def _order(name: str) -> str:
    return hashlib.sha256(name.encode()).hexdigest()


def _pinned(row: dict[str, Any], sample: Sample) -> Pinned:
    files: list[File] = [(sample.kind, path) for path in sample.paths]
    (message,) = messages_of(sample.conversations[:1], files)
    return Pinned(row["id"], message.parts, row["prediction"], row["answer"])
