"""What the report tells of pruning: can the references be believed, what stayed, what it is made of, and what it shows.

The template lays it out; tables are read by `scores`, pictures made by `gallery`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nvila.components.contracts.errors import DataError
from nvila.components.contracts.recipe.prune import JUDGED
from nvila.components.contracts.results.model import Composition, Judged, PrunedGroup, PrunedSource, Pruning
from nvila.components.contracts.steps import VALIDATE
from nvila.components.contracts.text import say
from nvila.components.data.media import MediaError, inside
from nvila.components.data.samples import SAMPLES_FILE, unchanged
from nvila.components.report import charts
from nvila.components.report.gallery import Picture, limits_of, picture
from nvila.components.report.scores import find, histograms
from nvila.components.runner.status import Run
from nvila.components.tracking.redact import redact_text, tell

SCORES_FILE = "scores.parquet"
ROWS, SOURCES, WORDS = 40, 24, 12
"""Of a table, of a step, and of a list of sentences: what is beyond is counted."""
CHART_KINDS, CHART_VALUES = 16, 8
EXAMPLES, ALL_EXAMPLES = 3, 48
"""Of a category, and of the page: so many pictures, none above some ten thousand bytes."""
TEXT = 240
"""Signs of a question or an answer."""
TITLES = {
    "deltaloss": "ranked by DeltaLoss",
    "multimodal-gain": "ranked by multimodal gain",
    "clusters": "as many from each cluster of pictures",
    "random": "chosen at random",
}
ABOUT = {
    "deltaloss": "DeltaLoss of a sample is the small reference model's loss of its answer less the large one's. "
    "High means worth learning.",
    "multimodal-gain": "Multimodal gain of a sample is the loss of its answer without the picture less that with it. "
    "High means that the picture matters.",
}
CATEGORIES = {
    "informative": "the large reference answers, the small one does not",
    "too easy": "both answer",
    "both fail": "neither answers",
    "distracting": "the small reference does better than the large one",
}
LOSSES = {"small": "small", "large": "large", "blank": "large, no picture", "question_only": "question only"}
SERIES = {"small": 1, "large": 0, "blank": 3, "question_only": 7}


@dataclass(frozen=True)
class Some:
    """The first of many."""

    shown: Sequence[Any]
    more: int = 0
    """How many there are besides."""

    @classmethod
    def of(cls, every: Iterable[Any], limit: int) -> Some:
        """No more than `limit`."""
        found = list(every)
        return cls(found[:limit], max(len(found) - limit, 0))


@dataclass(frozen=True)
class Example:
    """A sample of a category."""

    id: str
    picture: Picture
    question: str = ""
    answer: str = ""
    kept: bool | None = None
    losses: Mapping[str, str] = field(default_factory=dict)


def prune_parts(run: Run) -> list[dict[str, Any]]:
    """Per prune step that had samples to choose from: everything that the template shows of it."""
    told = {step: pruning for step, pruning in run.results(Pruning).items() if pruning.sources}
    slots = sum(len(of.examples) for pruning in told.values() for of in pruning.sources.values())
    each = max(1, min(EXAMPLES, ALL_EXAMPLES // max(slots, 1)))
    left, found = ALL_EXAMPLES, []
    for step, pruning in told.items():
        part = _part(run, step, pruning, each, left)
        left -= sum(len(c["examples"]) for source in part["sources"].shown for c in source["categories"])
        found.append(part)
    return found


def _part(run: Run, step: str, pruning: Pruning, each: int, most: int) -> dict[str, Any]:
    n, kept = (sum(getattr(of, name) for of in pruning.sources.values()) for name in ("n", "kept"))
    doubts = list(_doubts(pruning))
    scores = run.file(step, SCORES_FILE)
    return {
        "step": step,
        "title": _title(pruning, n, kept),
        "about": ABOUT.get(pruning.method, ""),
        "per": {"sum": "summed", "mean": "averaged"}.get(pruning.score or "", ""),
        "tone": "neutral" if doubts or pruning.shifted else "good" if pruning.judged else "plain",
        "trust": _trust(pruning),
        "doubts": Some.of(doubts, WORDS),
        "shifted": Some.of(pruning.shifted, WORDS),
        "skipped": pruning.skipped.records,
        "judged": _judged(pruning.judged),
        "losses_chart": _losses_chart(pruning.judged),
        "legend": {SERIES[name]: LOSSES[name] for name in _named(of.loss for of in pruning.judged.values())},
        "sources": _sources(run, pruning, scores, each, most),
        "groups": _groups(pruning),
    }


def _title(pruning: Pruning, n: int, kept: int) -> str:
    if pruning.method == "none":
        return f"All {n:,} samples stay: nothing was pruned"
    how = TITLES.get(pruning.method, f"by {pruning.method}")
    return f"{kept:,} of {n:,} samples stay, {how}"


def _trust(pruning: Pruning) -> str:
    """Whether the references can be believed, in a sentence."""
    if not pruning.judged:
        return ""
    every, good = len(pruning.judged), sum(of.trusted for of in pruning.judged.values())
    who = "The references" if pruning.method == "deltaloss" else "The reference"
    if good == every:
        return f"{who} can be believed" + (f" in each of {every} kinds of question." if every > 1 else ".")
    if not good:
        return f"{who} cannot be believed" + (f" in any of {every} kinds of question:" if every > 1 else ":")
    return f"{who} can be believed in {good} of {every} kinds of question, but not in:"


def _doubts(pruning: Pruning) -> Iterable[dict[str, str]]:
    """The kinds of question in which a reference proved nothing: why, and what became of their groups."""
    stood_in = [group for group in pruning.groups.values() if group.ranked_by != pruning.method]
    for kind, judged in pruning.judged.items():
        if not judged.trusted:
            fate = _fate([group for group in stood_in if group.judged == kind])
            yield {"kind": kind, "why": judged.why.rstrip(". "), "fate": fate}
    others = [group for group in stood_in if group.judged not in pruning.judged]
    if others and pruning.method in JUDGED:
        yield {"kind": "not judged", "why": "no held-out question stands for them", "fate": _fate(others)}


def _fate(groups: Sequence[PrunedGroup]) -> str:
    """What became of groups that the recipe's method did not rank: `2 groups stay whole (5,812 samples)`."""
    found = []
    for method in dict.fromkeys(group.ranked_by for group in groups):
        mine = [group for group in groups if group.ranked_by == method]
        n, kept = sum(group.n for group in mine), sum(group.kept for group in mine)
        many = f"{len(mine)} groups" if len(mine) > 1 else "1 group"
        if kept == n:
            found.append(f"{many} of {n:,} samples {'stay' if len(mine) > 1 else 'stays'} whole")
        else:
            found.append(f"of {many}, {kept:,} of {n:,} samples stay, {TITLES.get(method, f'by {method}')}")
    return "; ".join(found) or "no group of samples is of this kind"


def _judged(judged: Mapping[str, Judged]) -> dict[str, Any]:
    """The table of the kinds of question, without columns in which nothing stands."""
    losses, accuracies = _named(of.loss for of in judged.values()), _named(of.accuracy for of in judged.values())
    rows = [
        {
            "kind": kind,
            "n": of.n,
            "losses": [(LOSSES[name], of.loss.get(name), of.against.get(name)) for name in losses],
            "accuracies": [(LOSSES[name], of.accuracy.get(name)) for name in accuracies],
            "trusted": of.trusted,
        }
        for kind, of in judged.items()
    ]
    return {
        "losses": [LOSSES[name] for name in losses],
        "accuracies": [LOSSES[name] for name in accuracies],
        "rows": Some.of(rows, ROWS),
    }


def _named(told: Iterable[Mapping[str, float]]) -> list[str]:
    """Whose losses or accuracies are told at all, in our order."""
    having = {name for of in told for name in of}
    return [name for name in LOSSES if name in having]


def _losses_chart(judged: Mapping[str, Judged]) -> str:
    rows = [
        (
            tell(kind),
            [charts.Dot(SERIES[name], LOSSES[name], of.loss[name]) for name in reversed(LOSSES) if name in of.loss],
            of.trusted,
        )
        for kind, of in list(judged.items())[:CHART_KINDS]
    ]
    return charts.losses(rows, "Mean loss of an answer, by kind of question")


def _groups(pruning: Pruning) -> Some:
    """Those that the method did not rank first, then the largest."""
    order = sorted(pruning.groups.items(), key=lambda item: (item[1].ranked_by == pruning.method, -item[1].n))
    return Some.of(({"name": name, "of": group} for name, group in order), ROWS)


def _sources(run: Run, pruning: Pruning, scores: Path | None, each: int, most: int) -> Some:
    shown = dict(list(pruning.sources.items())[:SOURCES])
    drawn = _histograms(pruning, scores, shown)
    chosen = _chosen(shown, each, most)
    examples = _examples(run, scores, {sample for ids in chosen.values() for sample in ids})
    parts = [
        {
            "name": name,
            "of": source,
            "chart": drawn.get(name, ""),
            "compositions": [
                _composition(name, respect, of)
                for respect, of in source.composition.items()
                if source.kept < source.n and {**of.before, **of.after}
            ],
            "categories": [
                {
                    "name": category,
                    "about": CATEGORIES.get(category, ""),
                    "n": source.categories.get(category, 0),
                    "series": _series(category),
                    "share": source.categories.get(category, 0) / max(sum(source.categories.values()), 1),
                    "examples": [examples[sample] for sample in chosen.get((name, category), [])],
                }
                for category in _categories(source)
            ],
        }
        for name, source in shown.items()
    ]
    return Some(parts, len(pruning.sources) - len(parts))


def _categories(source: PrunedSource) -> list[str]:
    """Those that have samples, ours first."""
    having = [name for name, n in source.categories.items() if n]
    return [name for name in CATEGORIES if name in having] + [name for name in having if name not in CATEGORIES]


def _series(category: str) -> int:
    return {"informative": 0, "too easy": 2, "both fail": 7, "distracting": 1}.get(category, 4)


def _composition(source: str, respect: str, of: Composition) -> dict[str, Any]:
    """Bars of the commonest values, in their natural order where they are numbers; one value alone needs none."""
    shares = {value: (of.before.get(value, 0.0), of.after.get(value, 0.0)) for value in {**of.before, **of.after}}
    largest = sorted(shares, key=lambda value: (-max(shares[value]), value))[:CHART_VALUES]
    if all(re.match(r"\d", value) for value in largest):
        largest.sort(key=lambda value: [int(number) for number in re.findall(r"\d{1,9}", value)])
    rows = [(tell(value), *shares[value]) for value in largest]
    if rest := [both for value, both in shares.items() if value not in largest]:
        rows.append((f"{len(rest)} others", sum(before for before, _ in rest), sum(after for _, after in rest)))
    chart = charts.paired_bars(rows, f"{tell(respect)} of {tell(source)} before and after") if len(rows) > 1 else ""
    return {"respect": respect, "shift": of.shift, "chart": chart, "only": rows[0][0] if len(rows) == 1 else ""}


def _histograms(pruning: Pruning, scores: Path | None, sources: Collection[str]) -> dict[str, str]:
    """Of the scores by which the method ranked: not of groups that chance parted, whose scores mean nothing."""
    ranked = [name for name, group in pruning.groups.items() if group.ranked_by == pruning.method]
    if scores is None or pruning.method not in JUDGED or not ranked:
        return {}
    try:
        found = histograms(scores, sources, ranked)
    except DataError as error:
        _left_out(error)
        return {}
    return {
        source: charts.histogram(of.low, of.high, of.kept, of.dropped, f"Scores of {tell(source)}")
        for source, of in found.items()
    }


def _chosen(sources: Mapping[str, PrunedSource], each: int, most: int) -> dict[tuple[str, str], list[str]]:
    """Which samples are shown, by source and category: `most` of all sources together."""
    found = {}
    for name, source in sources.items():
        for category in _categories(source):
            found[name, category] = source.examples.get(category, [])[: min(each, most)]
            most -= len(found[name, category])
    return found


def _examples(run: Run, scores: Path | None, ids: Collection[str]) -> dict[str, Example]:
    if not ids:
        return {}
    samples = run.file(VALIDATE, SAMPLES_FILE)
    known = _found(samples, ids, ("root", "media", "media_sha256", "question", "answer"))
    scored = _found(scores, ids, ("loss_small", "loss_large", "loss_blank", "kept"))
    limits = limits_of(run)
    found = {}
    for sample in ids:
        row, score = known.get(sample, {}), scored.get(sample, {})
        losses = {name: _nats(score.get(f"loss_{name}")) for name in ("small", "large", "blank")}
        found[sample] = Example(
            id=sample,
            picture=picture(_paths(row), limits),
            question=_short(row.get("question")),
            answer=_short(row.get("answer")),
            kept=score.get("kept"),
            losses={LOSSES[name]: value for name, value in losses.items() if value},
        )
    return found


def _found(table: Path | None, ids: Collection[str], columns: Sequence[str]) -> dict[str, dict[str, Any]]:
    try:
        return find(table, ids, columns) if table else {}
    except DataError as error:
        _left_out(error)
        return {}


def _paths(row: Mapping[str, Any]) -> list[Path]:
    """Of a sample's media, none where one of them is no longer what was validated."""
    names, digests = row.get("media") or [], row.get("media_sha256") or []
    try:
        paths = [inside(Path(row["root"]), name) for name in names]
        return [unchanged(path, sha256) for path, sha256 in zip(paths, [*digests, *[None] * len(paths)], strict=False)]
    except (MediaError, KeyError, TypeError):
        return []


def _nats(loss: object) -> str:
    return f"{loss:.2f}" if isinstance(loss, float) and math.isfinite(loss) else ""


def _short(text: object) -> str:
    told = text if isinstance(text, str) else ""
    return told if len(told) <= TEXT else told[: TEXT - 1] + "…"


def _left_out(error: DataError) -> None:
    say(redact_text(f"left out: {error}"))
