"""Puts the rows before the expectations and turns the results into a quarantine."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import TYPE_CHECKING, Any

from nvila.components.contracts.recipe.data import Source, Validation
from nvila.components.validate import expectations
from nvila.components.validate.annotations import Row

if TYPE_CHECKING:
    import pandas as pd
    from great_expectations.core import ExpectationSuiteValidationResult

Result = tuple[str, "ExpectationSuiteValidationResult"]
"""What was checked, in one sentence, and what came of it."""


TOLD = {"form": "form_detail", "media_status": "media_detail"}
"""Columns that name a reason themselves, each with the one that has it in words."""


def judge(
    sources: Sequence[Source], records: list[Row], labels: list[Row], limits: Validation
) -> tuple[dict[str, Result], dict[str, Row]]:
    """Results by suite, and the quarantine's lines by record."""
    context = expectations.context()
    results: dict[str, Result] = {}
    quarantine: dict[str, Row] = {}
    for name, sentence, rows, expected in (
        ("records", "Each question and answer.", records, expectations.record_expectations(limits)),
        ("labels", "Each label of a training picture.", labels, expectations.label_expectations()),
    ):
        if rows:
            table = _table(rows, expected)
            result = expectations.check(context, name, table, expected)
            results[name] = (sentence, result)
            found = expectations.breaches(result, table)
            for row in rows:
                if (record := row[expectations.RECORD]) in found:
                    quarantine[record] = _quarantined(row, *found[record])
    for name, sentence, rows, expected in (
        ("pictures", "Each distinct media file.", _sides(records, labels), expectations.picture_expectations()),
        (
            "sources",
            "Each source as a whole.",
            _shares(sources, records, labels, quarantine, limits.max_quarantined_share),
            expectations.source_expectations(limits),
        ),
    ):
        results[name] = (sentence, expectations.check(context, name, _table(rows, expected), expected))
    return results, quarantine


def _table(rows: list[Row], expected: Sequence[Any]) -> pd.DataFrame:
    """The columns that the expectations look at, and the name of each row."""
    import pandas as pd

    keys = ("column", "column_A", "column_B")
    columns = [getattr(each, key) for each in expected for key in keys if getattr(each, key, None)]
    wanted = [expectations.RECORD, *dict.fromkeys(columns)]
    return pd.DataFrame({column: pd.Series([row[column] for row in rows]) for column in wanted})


def _sides(records: list[Row], labels: list[Row]) -> list[Row]:
    """One row per distinct file and side; labels are training data."""
    sides: dict[tuple[str, str], Row] = {}
    for row in (*records, *labels):
        side = "heldout" if row["split"] == "heldout" else "training"
        for sha256 in row["media_sha256"]:
            if sha256 is not None:
                sides.setdefault((sha256, side), {expectations.RECORD: row[expectations.RECORD], "sha256": sha256})
    return list(sides.values())


def _shares(
    sources: Sequence[Source], records: list[Row], labels: list[Row], quarantine: Mapping[str, Row], share: float
) -> list[Row]:
    """One row per source: its share of good SFT records, if it has any, and how many spoilt ones are too many."""
    asked = {row["source"] for row in records if row["split"] == "sft"}
    good = Counter(row["source"] for row in without(records, quarantine) if row["split"] == "sft")
    everything = Counter((row["source"], row["split"] == "labels") for row in (*records, *labels))
    spoilt = Counter((row["source"], row["split"] == "labels") for row in quarantine.values())

    def beyond(name: str, of_labels: bool) -> int:
        return spoilt[name, of_labels] - allowed(share, everything[name, of_labels])

    return [
        {
            expectations.RECORD: source.name,
            "share_of_sft": good[source.name] / max(good.total(), 1) if source.name in asked else None,
            "quarantined_beyond": beyond(source.name, False),
            "quarantined_labels_beyond": beyond(source.name, True),
        }
        for source in sources
    ]


def allowed(share: float, records: int) -> int:
    """How many of so many records may be spoilt: of a few, one always may."""
    return math.ceil(Fraction(str(share)) * records)


def without(rows: list[Row], quarantine: Mapping[str, Row]) -> list[Row]:
    """The rows that are not in quarantine."""
    return [row for row in rows if row[expectations.RECORD] not in quarantine]


def _quarantined(row: Row, reason: str, observed: Mapping[str, Any]) -> Row:
    """A line of the quarantine file."""
    seen = ", ".join(f"{name}: {value}" for name, value in observed.items())
    detail = next((row[told] for looked, told in TOLD.items() if looked in observed), seen)
    return {key: row[key] for key in ("id", "source", "split", "line")} | {"reason": reason, "detail": detail}
