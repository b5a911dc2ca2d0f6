"""From answers to verdicts, and to the page."""

from typing import Any

import numpy as np
import pytest

from nvila.pipelines.ablate import page
from nvila.pipelines.ablate.cases import ALL, Case, Design
from nvila.pipelines.ablate.table import EVERY, Answers, Row, answers_of, table

DESIGN = Design(methods=("deltaloss", "clusters", "random"), ratios=(0.5, 0.1), spoilt=False)
ACCURACY = {"deltaloss": {"color": 0.95, "yes/no": 0.3}, "clusters": {"color": 0.7, "yes/no": 0.7}}
"""Of the two kinds, by method; 0.7 where nothing stands."""


def _answers(case: Case) -> Answers:
    rng = np.random.default_rng([case.seed, int(case.ratio * 10), len(case.method), case.schedule == "epoch"])
    rows: list[dict[str, Any]] = []
    for kind in ("color", "yes/no"):
        accuracy = ACCURACY.get(case.method, {}).get(kind, 0.7)
        for number, right in enumerate(rng.random(200) < accuracy):
            rows.append({"stage": "train-4", "source": "shapes", "kind": kind, "id": f"{kind}{number}", "worth": right})
    return answers_of(rows)


@pytest.fixture(scope="module")
def rows() -> list[Row]:
    return table(DESIGN, {case: _answers(case) for case in DESIGN.runs()})


def test_every_row_of_the_design_is_told(rows: list[Row]) -> None:
    """A case that is shared with another schedule must not be missing from the table of its own."""
    told = {(row.schedule, row.method, row.ratio, row.kind) for row in rows}
    wanted = {(c.schedule, c.method, c.ratio, kind) for c in DESIGN.rows() for kind in ("color", "yes/no", EVERY)}
    assert told == wanted and all(len(row.seeds) == 3 and row.n in (200, 400) for row in rows)


def test_gain_on_one_kind_and_harm_on_another_are_both_told(rows: list[Row]) -> None:
    """Colours learnt, yes and no forgotten: the mean of a source hides it."""
    said = {(row.method, row.kind, row.verdict) for row in rows if row.ratio == 0.1}
    assert ("deltaloss", "color", "better") in said and ("deltaloss", "yes/no", "below") in said
    assert {v for m, _, v in said if m == "clusters"} == {"no difference beyond noise"}
    assert {v for m, _, v in said if m in (ALL, "random")} <= {None}


def test_corrections_are_within_a_ratio_and_schedule(rows: list[Row]) -> None:
    """More ratios must not make each one's verdict weaker: which ratio is used is chosen before."""
    for row in rows:
        if row.p is not None and row.p_gain is not None and row.p_harm is not None:
            assert row.p <= row.p_harm <= row.p_gain <= min(1.0, 2 * 3 * row.p + 1e-12)


def test_names_from_outside_cannot_write_into_the_page(rows: list[Row]) -> None:
    """Sources and kinds come from the user's data."""
    result = {
        "design": {"seeds": 3, "spoilt_share": 0.3, "reference": 0.5},
        "machine": {"cores": 2, "cpu": "<b>cpu"},
        "recipe": {"name": "tiny"},
        "commit": None,
        "command": ["nvila"],
        "cpu_seconds": 60.0,
        "rules": ["<i>"],
        "spoilt": {},
        "table": [row.json | {"source": "<script>alert(1)</script>"} for row in rows],
    }
    shown = page.render(result)
    assert "<script" not in shown and "<i>" not in shown.replace("<i></i>", "") and "<b>cpu" not in shown
    assert shown.count("<svg") == 2 and "whisker" in shown
