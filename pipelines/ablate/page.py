"""The result as one page that loads and runs nothing: accuracy against keep ratio, the verdicts, the spoilt answers."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from html import escape
from importlib import resources
from typing import Any

from nvila.components.report.charts import Line, line_plot
from nvila.components.tracking.redact import tell
from nvila.pipelines.ablate.cases import ALL, SCHEDULES
from nvila.pipelines.ablate.table import EVERY

SERIES = {"random": 7, "deltaloss": 0, "multimodal-gain": 1, "clusters": 2}
"""Colour of each method: the baseline is grey."""
ABOUT = {
    "epoch": "one epoch over each subset: a smaller one is trained on for less",
    "steps": "equal steps: a smaller one is passed over more often",
}
Row = Mapping[str, Any]


def render(result: Mapping[str, Any]) -> str:
    """The page of a result as `experiment` writes it."""
    return document("What pruning keeps", _body(result))


def document(title: str, body: Iterable[str]) -> str:
    """A whole page that loads and runs nothing."""
    style = resources.files("nvila.components.report").joinpath("style.css").read_text(encoding="utf-8")
    policy = "default-src 'none'; style-src 'unsafe-inline'"
    joined = "\n".join(body)
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        f"<title>{title}</title>\n<style>{style}</style>\n</head>\n<body>\n<main>\n{joined}\n</main>\n"
        "</body>\n</html>\n"
    )


def header(result: Mapping[str, Any], title: str) -> Iterator[str]:
    """What was compared, and what it took."""
    design, machine = result["design"], result["machine"]
    yield "<header>"
    yield f"<p class='soft'>NVILA recipe <b>{text(result['recipe']['name'])}</b>, commit {text(result['commit'])}</p>"
    yield f"<h1>{title}</h1>"
    yield (
        f"<p class='lead'>{design['seeds']} seeds, {result['cpu_seconds'] / 60:.0f} CPU minutes on {machine['cores']} "
        f"cores of {text(machine['cpu'])}. <code>{text(' '.join(result['command']))}</code></p></header>"
    )


def rules(result: Mapping[str, Any]) -> Iterator[str]:
    """By which it was judged."""
    yield "<h2>Rules, fixed before the run</h2><ul>"
    yield from (f"<li>{text(rule)}</li>" for rule in result["rules"])
    yield "</ul>"


def _body(result: Mapping[str, Any]) -> Iterator[str]:
    yield from header(result, "What pruning keeps, and what a model learns of it")
    rows = [row for row in result["table"] if not row["spoilt"]]
    for stage in dict.fromkeys(row["stage"] for row in rows):
        yield f"<h2>After {text(stage)}</h2>"
        yield from _charts([row for row in rows if row["stage"] == stage])
        yield _accuracy([row for row in rows if row["stage"] == stage])
    if spoilt := [row for row in result["table"] if row["spoilt"]]:
        yield "<h2>With spoilt answers</h2>"
        yield _dropped(result)
        for stage in dict.fromkeys(row["stage"] for row in spoilt):
            yield f"<h3>What the model reaches with what stays of them, after {text(stage)}</h3>"
            yield _accuracy([row for row in spoilt if row["stage"] == stage])
    yield from rules(result)


def _charts(rows: Sequence[Row]) -> Iterator[str]:
    """By source and schedule, accuracy on all questions of it against the keep ratio, with the spread over seeds."""
    methods = [method for method in dict.fromkeys(row["method"] for row in rows) if method != ALL]
    items = "".join(f"<li class='s{SERIES.get(name, 3)}'><i></i>{text(name)}</li>" for name in methods)
    yield f"<ul class='legend'>{items}</ul>"
    yield "<p class='note'>From left to right the share of samples kept, at 1 all of them; upwards the accuracy on "
    yield "held-out questions. Whiskers are one standard deviation over seeds.</p><div class='columns'>"
    for source in dict.fromkeys(row["source"] for row in rows):
        mine = [row for row in rows if row["source"] == source]
        whole = EVERY if any(row["kind"] == EVERY for row in mine) else mine[0]["kind"]
        for schedule in SCHEDULES:
            some = [row for row in mine if row["kind"] == whole and row["schedule"] == schedule]
            yield f"<div class='card'><h3>{text(source)}</h3><p class='note'>{ABOUT[schedule]}</p>"
            title = f"Accuracy on {source} against the share of samples kept, {schedule}"
            yield line_plot(list(_lines(some)), title, y_range=(0, 1), marks=True) + "</div>"
    yield "</div>"


def _lines(rows: Sequence[Row]) -> Iterator[Line]:
    everything = [row for row in rows if row["method"] == ALL]
    by_method: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        if row["method"] != ALL:
            by_method[row["method"]].append(row)
    for method, some in by_method.items():
        points = sorted([*some, *everything], key=lambda row: row["ratio"])
        yield Line(
            series=SERIES.get(method, 3),
            label=method,
            points=[(row["ratio"], row["mean"]) for row in points],
            spread=[row["spread"] for row in points],
        )


def _accuracy(rows: Sequence[Row]) -> str:
    """A row per case, a column per source and kind; what differs from chance beyond noise is marked."""
    groups = list(dict.fromkeys((row["source"], row["kind"], row["n"]) for row in rows))
    cells = {(row["schedule"], row["ratio"], row["method"], row["source"], row["kind"]): row for row in rows}
    head = ("trained", "kept", "method", *(f"{source}, {kind} ({n})" for source, kind, n in groups))
    lines = []
    for schedule, ratio, method in dict.fromkeys((row["schedule"], row["ratio"], row["method"]) for row in rows):
        found = [cells[schedule, ratio, method, source, kind] for source, kind, _ in groups]
        lines.append((schedule, "all" if method == ALL else f"{ratio:g}", method, *map(_cell, found)))
    caption = "Mean ± standard deviation over seeds, and p against a random subset of the same size, not corrected. "
    return table(caption + "▲ better than it, ▼ below it, beyond noise.", head, lines)


def _cell(row: Row) -> str:
    mark = {"better": " ▲", "below": " ▼"}.get(row["verdict"] or "", "")
    p = "" if row["p"] is None else " p < 0.001" if row["p"] < 0.001 else f" p {row['p']:.2g}"
    return f"{row['mean']:.3f} ± {row['spread']:.3f}{mark}{p}"


def _dropped(result: Mapping[str, Any]) -> str:
    share, ratio = result["design"]["spoilt_share"], result["design"]["reference"]
    caption = (
        f"{share:.0%} of the answers of each source are another sample's. What share of them each method drops at keep "
        f"ratio {ratio:g}, where chance drops {1 - ratio:g}."
    )
    cells = [
        (method, source, str(told["spoilt"]), f"{told['dropped_share']:.3f}")
        for method, sources in result["spoilt"].items()
        for source, told in sources.items()
    ]
    return table(caption, ("method", "source", "spoilt", "dropped"), cells)


def table(caption: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Of texts."""
    top = "".join(f"<th>{text(name)}</th>" for name in head)
    body = "\n".join("<tr>" + "".join(f"<td>{text(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return (
        f"<div class='scroll' tabindex='0'><table><caption>{text(caption)}</caption><thead><tr>{top}</tr></thead>"
        f"<tbody>{body}</tbody></table></div>"
    )


def text(value: object) -> str:
    """As HTML, secrets taken out."""
    return escape(tell(str(value)))
