"""Stops where the data as a whole cannot be used, and says everything that stands against it at once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nvila.components.contracts.errors import DataError
from nvila.components.contracts.recipe.data import LABELS, DataSettings, Source
from nvila.components.data.samples import QUARANTINE_FILE
from nvila.components.validate.annotations import Row
from nvila.components.validate.expectations import RECORD, configuration
from nvila.components.validate.judge import Result

SHOWN_REASONS = 3
"""The commonest ones, with their numbers and an example each."""
DETAIL_CHARACTERS = 160


def refuse(
    data: DataSettings, results: Mapping[str, Result], rows: Sequence[Row], quarantine: Mapping[str, Row], out: Path
) -> None:
    """Look at what was found of the sources and of their pictures as a whole.

    Args:
        data: sources and limits.
        results: of all suites.
        rows: all records and labels.
        quarantine: its lines, by record.
        out: has the quarantine's file.

    Raises:
        DataError: something stands against the data. Its details have the path of the quarantine and, by source, how
            many records there are, how many are spoilt, and the number of each reason.
    """
    breached = {
        configuration(each).meta["reason"]: each.result["unexpected_index_list"]
        for name in ("pictures", "sources")
        for each in results[name][1].results
        if not each.success
    }
    if not breached:
        return
    problems: list[str] = []
    advice: list[str] = []
    names = {reason: [item[RECORD] for item in items] for reason, items in breached.items()}
    for source in data.sources:
        spoilt = [reason for reason in ("spoilt", "spoilt_labels") if source.name in names.get(reason, ())]
        problems += [_spoilt(source, reason, rows, quarantine, data) for reason in spoilt]
        if not spoilt and source.name in names.get("unbalanced", ()):
            problems.append(_small(source, rows, quarantine, data))
    if any("spoilt" in reason for reason in breached):
        advice.append(
            f"Each spoilt record and what is wrong with it is in {out / QUARANTINE_FILE}: mend the data, or raise "
            "data.validation.max_quarantined_share"
        )
    if any("at least" in problem for problem in problems):
        advice.append(
            "Add records to a source that is too small, leave it out, or lower data.validation.min_source_share"
        )
    if leaks := breached.get("leak"):
        pair = " and ".join(item[RECORD] for item in leaks if item["sha256"] == leaks[0]["sha256"])
        count = len({item["sha256"] for item in leaks})
        problems.append(f"{count} held-out pictures are training pictures as well, first {pair}")
        advice.append("Take them out of one side: accuracy on them would mean nothing")
    raise DataError("; ".join(problems), do=". ".join(advice), details=_details(data, rows, quarantine, out))


def commonest(reasons: Mapping[str, int]) -> list[tuple[str, int]]:
    """Reasons with their numbers, the commonest first."""
    return sorted(reasons.items(), key=lambda pair: (-pair[1], pair[0]))


def _spoilt(source: Source, reason: str, rows: Sequence[Row], quarantine: Mapping[str, Row], data: DataSettings) -> str:
    of_labels = reason == "spoilt_labels"
    mine = [row for row in rows if row["source"] == source.name and (row["split"] == LABELS) == of_labels]
    lines = [quarantine[row[RECORD]] for row in mine if row[RECORD] in quarantine]
    counted = commonest(Counter(line["reason"] for line in lines))
    examples = {line["reason"]: line["detail"] for line in reversed(lines)}
    shown = ", ".join(f"{count} {name} ({_cut(examples[name])})" for name, count in counted[:SHOWN_REASONS])
    more = sum(count for _, count in counted[SHOWN_REASONS:])
    what = LABELS if of_labels else "records"
    allowed = f"{100 * data.validation.max_quarantined_share:g}%"
    others = f", and {more} for other reasons" if more else ""
    return (
        f"source {source.name!r} ({Path(source.path).absolute()}): {len(lines)} of {len(mine)} {what} are spoilt, more "
        f"than {allowed}: {shown}{others}"
    )


def _small(source: Source, rows: Sequence[Row], quarantine: Mapping[str, Row], data: DataSettings) -> str:
    good = Counter(row["source"] for row in rows if row["split"] == "sft" and row[RECORD] not in quarantine)
    return (
        f"source {source.name!r} ({Path(source.path).absolute()}) has {good[source.name]} of {good.total()} good SFT "
        f"records; at least {100 * data.validation.min_source_share:g}% are asked for"
    )


def _details(data: DataSettings, rows: Sequence[Row], quarantine: Mapping[str, Row], out: Path) -> dict[str, Any]:
    records = Counter(row["source"] for row in rows)
    reasons = {source.name: Counter[str]() for source in data.sources}
    for line in quarantine.values():
        reasons[line["source"]][line["reason"]] += 1
    sources = {
        name: {"records": records[name], "quarantined": counted.total(), "reasons": dict(commonest(counted))}
        for name, counted in reasons.items()
    }
    return {"quarantine": str((out / QUARANTINE_FILE).absolute()), "sources": sources}


def _cut(text: str) -> str:
    return text if len(text) <= DETAIL_CHARACTERS else text[: DETAIL_CHARACTERS - 1] + "…"
