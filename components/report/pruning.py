"""What the report tells of pruning: can the references be believed, what stayed, what it is made of, and what it shows.

The template lays it out; tables are read by `scores`, samples shown by `examples`.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nvila.components.contracts.errors import DataError
from nvila.components.contracts.recipe.prune import JUDGED
from nvila.components.contracts.results.model import Composition, Judged, PrunedGroup, Pruning
from nvila.components.metrics.pruned import believed, how, what_stays
from nvila.components.report import charts
from nvila.components.report.examples import CATEGORIES, PER_CATEGORY, PER_PAGE, categories, chosen, examples, left_out
from nvila.components.report.scores import histograms
from nvila.components.runner.status import Run
from nvila.components.tracking.redact import tell

SCORES_FILE = "scores.parquet"
ROWS, SOURCES, WORDS = 40, 24, 12
"""Of a table, of a step, and of a list of sentences: what is beyond is counted."""
CHART_KINDS, CHART_VALUES = 16, 8
OTHERS = "others"
"""Values that the step has counted together."""
ABOUT = {
    "deltaloss": "DeltaLoss of a sample is the small reference model's loss of its answer less the large one's. "
    "High means worth learning.",
    "multimodal-gain": "Multimodal gain of a sample is the loss of its answer without the picture less that with it. "
    "High means that the picture matters.",
}
LOSSES = {"small": "small", "large": "large", "blank": "large, no picture", "question_only": "question only"}
"""By what they are told of."""
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


def prune_parts(run: Run) -> list[dict[str, Any]]:
    """Per prune step that had samples to choose from: everything that the template shows of it."""
    told = {step: pruning for step, pruning in run.results(Pruning).items() if pruning.sources}
    slots = sum(len(of.examples) for pruning in told.values() for of in pruning.sources.values())
    each = max(1, min(PER_CATEGORY, PER_PAGE // max(slots, 1)))
    left, found = PER_PAGE, []
    for step, pruning in told.items():
        part = _part(run, step, pruning, each, left)
        left -= sum(len(c["examples"]) for source in part["sources"].shown for c in source["categories"])
        found.append(part)
    return found


def _part(run: Run, step: str, pruning: Pruning, each: int, most: int) -> dict[str, Any]:
    doubts = list(_doubts(pruning))
    scores = run.file(step, SCORES_FILE)
    return {
        "step": step,
        "title": what_stays(pruning),
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


def _trust(pruning: Pruning) -> str:
    """Whether the references can be believed; what does not hold follows."""
    good = {of.trusted for of in pruning.judged.values()}
    end = "." if False not in good else ", but not in:" if True in good else ":"
    return f"{said}{end}" if (said := believed(pruning)) else ""


def _doubts(pruning: Pruning) -> Iterable[dict[str, str]]:
    """The kinds of question in which a reference proved nothing: why, and what became of their groups."""
    # A method that asks no reference, and only compares one that does, ranks every group as it would anyhow.
    own = {pruning.method} & set(JUDGED)
    stood_in = [group for group in pruning.groups.values() if group.ranked_by not in own]
    for kind, judged in pruning.judged.items():
        if not judged.trusted:
            fate = _fate([group for group in stood_in if kind in group.kinds])
            yield {"kind": kind, "why": judged.why.rstrip(". "), "fate": fate}
    others = [group for group in stood_in if not pruning.judged.keys() & group.kinds]
    if others and pruning.method in JUDGED:
        kinds = _few({kind: None for group in others for kind in group.kinds})
        yield {"kind": kinds, "why": "there is no held-out question of the kind", "fate": _fate(others)}


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
            found.append(f"{kept:,} of the {n:,} samples of {many} stay, {how(method)}")
    return "; ".join(found) or "No sample is of this kind"


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
    if all(name in pruning.sources and of.ranked_by == pruning.method for name, of in pruning.groups.items()):
        return Some(())  # each source is a group, as told already
    order = sorted(pruning.groups.items(), key=lambda item: (item[1].ranked_by == pruning.method, -item[1].n))
    own = all(group.kinds in ([], [name]) for name, group in order)
    return Some.of(
        ({"name": name, "of": group, "kinds": "" if own else _few(group.kinds)} for name, group in order), ROWS
    )


def _few(names: Iterable[str]) -> str:
    some = Some.of(names, 3)
    return ", ".join(some.shown) + (f" and {some.more} more" if some.more else "")


def _sources(run: Run, pruning: Pruning, scores: Path | None, each: int, most: int) -> Some:
    shown = dict(list(pruning.sources.items())[:SOURCES])
    drawn = _histograms(pruning, scores, shown)
    named = chosen(shown, each, most)
    known = examples(run, scores, {sample for ids in named.values() for sample in ids})
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
                    "examples": [known[sample] for sample in named.get((name, category), [])],
                }
                for category in categories(source)
            ],
        }
        for name, source in shown.items()
    ]
    return Some(parts, len(pruning.sources) - len(parts))


def _series(category: str) -> int:
    return {"informative": 0, "too easy": 2, "both fail": 7, "distracting": 1}.get(category, 4)


def _composition(source: str, respect: str, of: Composition) -> dict[str, Any]:
    """Bars of the commonest values, in their natural order where they are numbers; one value alone needs none."""
    shares = {value: (of.before.get(value, 0.0), of.after.get(value, 0.0)) for value in {**of.before, **of.after}}
    largest = sorted(shares.keys() - {OTHERS}, key=lambda value: (-max(shares[value]), value))[:CHART_VALUES]
    if all(re.match(r"\d", value) for value in largest):
        largest.sort(key=lambda value: [int(number) for number in re.findall(r"\d{1,9}", value)])
    rows = [(tell(value), *shares[value]) for value in largest]
    if rest := [both for value, both in shares.items() if value not in largest]:
        name = OTHERS if OTHERS in shares else f"{len(rest)} {OTHERS}"
        rows.append((name, sum(before for before, _ in rest), sum(after for _, after in rest)))
    chart = charts.paired_bars(rows, f"{tell(respect)} of {tell(source)} before and after") if len(rows) > 1 else ""
    return {"respect": respect, "shift": of.shift, "chart": chart, "only": rows[0][0] if len(rows) == 1 else ""}


def _histograms(pruning: Pruning, scores: Path | None, sources: Collection[str]) -> dict[str, str]:
    """Of the scores by which the method ranked: not where the references are not believed and chance stands in."""
    good = [kind for kind, of in pruning.judged.items() if of.trusted]
    if scores is None or pruning.method not in JUDGED or not good:
        return {}
    try:
        found = histograms(scores, sources, good)
    except DataError as error:
        left_out(error)
        return {}
    return {
        source: charts.histogram(of.low, of.high, of.kept, of.dropped, f"Scores of {tell(source)}")
        for source, of in found.items()
    }
