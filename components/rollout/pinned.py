"""The pinned prompts: held-out questions whose answers the evaluation has on record, always the same for one model."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

from nvila.components.contracts.errors import RolloutError
from nvila.components.contracts.manifest import Manifest
from nvila.components.contracts.progress import track
from nvila.components.data.samples import Sample, read_samples
from nvila.components.metrics.accuracy import is_correct
from nvila.components.model.text.conversation import Part, messages_of
from nvila.components.rollout.policy import Asked
from nvila.components.serve import server


@dataclass(frozen=True)
class Pinned:
    """A question, what the evaluated model said, and the truth."""

    id: str
    question: tuple[Part[server.File], ...]
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


def observe(url: str, model: str, prompts: Sequence[Pinned], max_tokens: int, api_key: str) -> Asked:
    """Ask a running server every prompt."""
    seen = Asked()
    for prompt in track(prompts, f"pinned prompts to {url}"):
        seen += ask(url, model, prompt, max_tokens, api_key)
    return seen


def ask(url: str, model: str, prompt: Pinned, max_tokens: int, api_key: str) -> Asked:
    """Ask it one."""
    return judged(
        lambda: server.ask(url, model, prompt.question, max_tokens=max_tokens, api_key=api_key),
        prompt.expected,
        prompt.answer,
    )


def judged(ask: Callable[[], server.Answer], expected: str, answer: str) -> Asked:
    """What one question comes to.

    Args:
        ask: asks it.
        expected: what the evaluated model said.
        answer: the truth.
    """
    try:
        said = ask()
    except RolloutError:
        return Asked(asked=1, errors=1)
    return Asked(
        asked=1,
        agreed=is_correct(said.text, expected),
        right=is_correct(said.text, answer),
        without_value=not said.finite,
    )


def _order(name: str) -> str:
    return hashlib.sha256(name.encode()).hexdigest()


def _pinned(row: dict[str, Any], sample: Sample) -> Pinned:
    files: list[server.File] = [(sample.kind, path) for path in sample.paths]
    (message,) = messages_of(sample.conversations[:1], files)
    return Pinned(row["id"], message.parts, row["prediction"], row["answer"])
