"""Samples of each category that pruning tells of: their pictures, questions, answers and losses, some of each."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nvila.components.contracts.errors import DataError
from nvila.components.contracts.results.model import PrunedSource
from nvila.components.contracts.steps import VALIDATE
from nvila.components.contracts.text import say
from nvila.components.data.media import MediaError, inside
from nvila.components.data.samples import SAMPLES_FILE, unchanged
from nvila.components.report.gallery import CLIP_FRAMES, Picture, limits_of, picture
from nvila.components.report.scores import find
from nvila.components.runner.status import Run
from nvila.components.tracking.redact import redact_text

PER_CATEGORY, PER_PAGE = 3, 48
"""Samples shown; their pictures are small, whatever lies there."""
TEXT = 240
"""Signs of a question or an answer."""
CATEGORIES = {
    "informative": "the large reference knows more of the answer than the small one",
    "too easy": "both know the answer",
    "both fail": "neither knows the answer",
    "distracting": "the large reference knows less of the answer than the small one",
}
LOSSES = {"loss_small": "small", "loss_large": "large", "loss_blank": "large, no picture"}
"""Columns of the score table, and what they are called."""


@dataclass(frozen=True)
class Example:
    """A sample of a category."""

    id: str
    picture: Picture
    question: str = ""
    answer: str = ""
    kept: bool | None = None
    losses: Mapping[str, str] = field(default_factory=dict)


def categories(source: PrunedSource) -> list[str]:
    """Those that have samples, ours first."""
    having = [name for name, n in source.categories.items() if n]
    return [name for name in CATEGORIES if name in having] + [name for name in having if name not in CATEGORIES]


def chosen(sources: Mapping[str, PrunedSource], each: int, most: int) -> dict[tuple[str, str], list[str]]:
    """Which samples are shown, by source and category: `most` of all sources together."""
    found = {}
    for name, source in sources.items():
        for category in categories(source):
            found[name, category] = source.examples.get(category, [])[: min(each, most)]
            most -= len(found[name, category])
    return found


def examples(run: Run, scores: Path | None, ids: Collection[str]) -> dict[str, Example]:
    """The samples with these ids, as far as the tables still tell of them."""
    if not ids:
        return {}
    samples = run.file(VALIDATE, SAMPLES_FILE)
    known = _found(samples, ids, ("root", "media", "media_sha256", "question", "answer"))
    scored = _found(scores, ids, (*LOSSES, "kept"))
    limits = limits_of(run)
    found = {}
    for sample in ids:
        row, score = known.get(sample, {}), scored.get(sample, {})
        losses = {name: _nats(score.get(column)) for column, name in LOSSES.items()}
        found[sample] = Example(
            id=sample,
            picture=picture(_paths(row), limits),
            question=_short(row.get("question")),
            answer=_short(row.get("answer")),
            kept=score.get("kept"),
            losses={name: value for name, value in losses.items() if value},
        )
    return found


def _found(table: Path | None, ids: Collection[str], columns: Sequence[str]) -> dict[str, dict[str, Any]]:
    try:
        return find(table, ids, columns) if table else {}
    except DataError as error:
        left_out(error)
        return {}


def _paths(row: Mapping[str, Any]) -> list[Path]:
    """Of a sample's media, none where one of them is no longer what was validated."""
    try:
        names, digests = (row.get("media") or [])[:CLIP_FRAMES], row.get("media_sha256") or []
        paths = [inside(Path(row["root"]), name) for name in names]
        return [unchanged(path, sha256) for path, sha256 in zip(paths, [*digests, *[None] * len(paths)], strict=False)]
    except (MediaError, KeyError, TypeError):
        return []


def _nats(loss: object) -> str:
    return f"{loss:.2f}" if isinstance(loss, float) and math.isfinite(loss) else ""


def _short(text: object) -> str:
    told = text if isinstance(text, str) else ""
    return told if len(told) <= TEXT else told[: TEXT - 1] + "…"


def left_out(error: DataError) -> None:
    """Say in the log what the page lacks."""
    say(redact_text(f"left out: {error}"))
