"""Step `ablate-spoil`: a sample table in which a share of the SFT answers is another sample's of the same source."""

from __future__ import annotations

import json
import random
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import Field

from nvila.components.contracts.errors import DataError
from nvila.components.contracts.manifest import Manifest
from nvila.components.contracts.recipe.section import Section
from nvila.components.contracts.step import Outcome
from nvila.components.data.samples import SAMPLES_FILE, read_limits, write_samples
from nvila.components.metrics.accuracy import normal_form

SPOILT_FILE = "spoilt.json"
"""Ids of the samples whose answer was replaced."""
_TRIES = 1000


class Settings(Section):
    """What is spoilt."""

    share: float = Field(default=0.3, gt=0, lt=1)
    """Of the SFT samples of each source."""
    seed: int = 0


def run(settings: Settings, inputs: Mapping[str, Manifest], out: Path) -> Outcome:
    """Replace the first answer of a random share of each source's SFT samples by that of another one of them.

    Each answer that is taken away is given to exactly one other sample, whose own reads otherwise: answers are as
    frequent as before, and nothing but the picture tells which are wrong.

    Args:
        settings: share and seed.
        inputs: `samples`, the table of `validate`.
        out: gets `samples.parquet` and `spoilt.json`.

    Raises:
        DataError: more than half of the chosen samples of a source have one answer.
    """
    import pyarrow.parquet as parquet

    table = inputs["samples"].path(SAMPLES_FILE)
    rows: list[dict[str, Any]] = parquet.read_table(table).to_pylist()
    by_source: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        if row["split"] == "sft":
            by_source[row["source"]].append(row)
    spoilt: list[str] = []
    for source, some in sorted(by_source.items()):
        rng = random.Random(f"{settings.seed} {source}")
        chosen = rng.sample(some, round(settings.share * len(some)))
        texts = [row["answer"] for row in chosen]
        for row, answer in zip(chosen, deranged(texts, rng, where=source), strict=True):
            _replace(row, answer)
        spoilt += [row["id"] for row in chosen]
    write_samples(out / SAMPLES_FILE, rows, read_limits(table))
    (out / SPOILT_FILE).write_text(json.dumps(sorted(spoilt)), encoding="utf-8")
    return Outcome(kind="dataset", files=(SAMPLES_FILE, SPOILT_FILE))


def deranged(texts: Sequence[str], rng: random.Random, where: str = "") -> list[str]:
    """The same texts in another order, in which none reads as the one that was in its place.

    Raises:
        DataError: one of them is more than half of all, or nearly so.
    """
    same, order = [normal_form(text) for text in texts], list(range(len(texts)))
    rng.shuffle(order)
    for i in range(len(order)):
        for _ in range(_TRIES):
            if same[order[i]] != same[i]:
                break
            j = rng.randrange(len(order))
            if same[order[j]] != same[i] and same[order[i]] != same[j]:
                order[i], order[j] = order[j], order[i]
        else:
            raise DataError(
                "too many samples have the same answer to give each another one's",
                where=where or None,
                value=same[i],
                do="Run it with --no-spoilt.",
            )
    return [texts[place] for place in order]


def _replace(row: dict[str, Any], answer: str) -> None:
    turns = json.loads(row["conversations"])
    next(turn for turn in turns if turn["from"] == "gpt")["value"] = answer
    row["answer"], row["conversations"] = answer, json.dumps(turns)
