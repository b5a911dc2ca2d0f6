"""Great Expectations' data docs as one file that reads well offline: its rendered sections in a page of our own."""

from __future__ import annotations

import copy
import html
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from nvila.components.validate.expectations import configuration

if TYPE_CHECKING:
    from great_expectations.core import ExpectationSuiteValidationResult

LISTED = 100
"""Quarantined records that the page lists; all of them are in quarantine.jsonl."""
POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
"""Nothing is loaded and nothing runs, whatever text of the data gets into the page."""
STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8881; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem } h2 { font-size: 1.25rem; margin-top: 2.5rem; border-bottom: 1px solid var(--line) }
h5 { font-size: 1rem; margin: 1.2rem 0 .3rem } h6 { font-size: .9rem; margin: 0 }
table { border-collapse: collapse; width: 100%; font-size: .9rem } th { text-align: left }
td, th { border-bottom: 1px solid var(--line); padding: .3rem .7rem .3rem 0; vertical-align: top }
td table { width: auto; margin: .4rem 0; background: var(--soft) } td table td, td table th { padding: .2rem .6rem }
td, td * { overflow-wrap: anywhere }
.badge { background: var(--soft); border-radius: .3rem; padding: 0 .35rem; font-family: ui-monospace, monospace }
.text-success, .passed { color: #1a7f37 } .text-danger, .failed { color: #cf222e }
.fa-check-circle::before { content: "\\2713"; font-style: normal } .fa-times::before { content: "\\2717" }
.fas { font-style: normal; font-weight: bold }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums }
"""


def page(
    results: Mapping[str, tuple[str, ExpectationSuiteValidationResult]],
    counts: Mapping[str, Mapping[str, int]],
    quarantine: Sequence[Mapping[str, Any]],
) -> str:
    """The whole page as HTML without references to anything outside it.

    Args:
        results: by suite: a sentence that says what was checked, and the result.
        counts: good records by source and split.
        quarantine: the quarantined records.
    """
    passed = sum(bool(each.success) for _, result in results.values() for each in result.results)
    total = sum(len(result.results) for _, result in results.values())
    parts = [
        f"<h1>Data validation</h1><p>{passed} of {total} expectations hold on every row. "
        f"{len(quarantine)} records are in quarantine; everything else goes on.</p>",
        "<h2>Good records</h2>" + _counts(counts),
        "<h2>Quarantine</h2>" + _quarantine(quarantine),
    ]
    for name, (sentence, result) in results.items():
        verdict, shown = ("passed", "all hold") if result.success else ("failed", "not all hold")
        parts.append(f'<h2>Expectations on {html.escape(name)}: <span class="{verdict}">{shown}</span></h2>')
        parts.append(f"<p>{html.escape(sentence)}</p>{_rules(result)}{_sections(result, name)}")
    head = (
        '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        f"<title>Data validation</title><style>{STYLE}</style>"
    )
    return f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body>{"".join(parts)}</body></html>\n'


def _rules(result: ExpectationSuiteValidationResult) -> str:
    """The rules in words, and how many rows break each."""
    rows = [
        [configuration(each).notes, each.result["element_count"], each.result["unexpected_count"]]
        for each in result.results
    ]
    return _table(["rule", "rows", "break it"], rows)


def _sections(result: ExpectationSuiteValidationResult, name: str) -> str:
    """Great Expectations' own sections; the first, with times and versions of this run, is left out."""
    from great_expectations.render.renderer import ValidationResultsPageRenderer
    from great_expectations.render.view import DefaultJinjaSectionView

    shown = copy.deepcopy(result)
    for each in shown.results:
        each.result = _escaped(each.result)
    shown.meta["run_id"] = None  # type: ignore[typeddict-item,arg-type]
    document = ValidationResultsPageRenderer(run_info_at_end=False).render(shown)
    view = DefaultJinjaSectionView()
    texts = []
    for index, section in enumerate(document.sections[1:], 1):
        loop = {"index": f"{name}-{index}"}
        texts.append(view.render({"section": section.to_json_dict(), "section_loop": loop}))
    return "".join(texts)


def _escaped(value: Any) -> Any:
    """Observed values are the user's text, and the templates write some of them as they are."""
    if isinstance(value, str):
        return html.escape(value)
    if isinstance(value, Mapping):
        return {key: _escaped(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_escaped(item) for item in value]
    return value


def _counts(counts: Mapping[str, Mapping[str, int]]) -> str:
    splits = list(dict.fromkeys(split for row in counts.values() for split in row))
    rows = [[source, *(row.get(split, 0) for split in splits)] for source, row in counts.items()]
    return _table(["source", *splits], rows)


def _quarantine(records: Sequence[Mapping[str, Any]]) -> str:
    if not records:
        return "<p>Empty.</p>"
    columns = ["id", "line", "reason", "detail"]
    more = f"<p>and {len(records) - LISTED} more in quarantine.jsonl</p>" if len(records) > LISTED else ""
    return _table(columns, [[record[column] for column in columns] for record in records[:LISTED]]) + more


def _table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    def cell(value: Any, tag: str, like: Any) -> str:
        kind = ' class="number"' if isinstance(like, int) else ""
        return f"<{tag}{kind}>{html.escape(f'{value:,}' if isinstance(value, int) else str(value))}</{tag}>"

    head = "".join(cell(column, "th", like) for column, like in zip(columns, rows[0], strict=True))
    body = "".join(f"<tr>{''.join(cell(value, 'td', value) for value in row)}</tr>" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
