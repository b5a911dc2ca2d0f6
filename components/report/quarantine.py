"""What validation set aside in a run, by source and reason, for the page and for `summary.json`; also of a run that it
refused, which has no manifest of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nvila.components.contracts import jsonlines
from nvila.components.contracts.results.result import Result
from nvila.components.contracts.steps import VALIDATE
from nvila.components.data.samples import QUARANTINE_FILE
from nvila.components.runner.status import Run

DETAIL_CHARACTERS = 300


class Reason(Result):
    """Records of a source that were set aside for one reason."""

    source: str
    reason: str
    count: int
    id: str
    """Of the first of them."""
    line: int | None
    """Its place in its file, from 0."""
    detail: str
    """What is wrong with it."""


def quarantine_file(run: Run) -> Path | None:
    """Where the records lie that validation set aside; None where it did not come so far."""
    if VALIDATE in run.manifests:
        return Path(run.manifests[VALIDATE].folder, QUARANTINE_FILE)
    told = ((run.step(VALIDATE).error or {}).get("details") or {}).get("quarantine")
    return Path(told) if told else None


def set_aside(run: Run) -> list[dict[str, Any]]:
    """The lines of that file; none where it is not there as validation wrote it."""
    path = run.file(VALIDATE, QUARANTINE_FILE) if VALIDATE in run.manifests else quarantine_file(run)
    return list(jsonlines.whole(path)) if path and path.is_file() else []


def reasons(records: list[dict[str, Any]]) -> list[Reason]:
    """Why they were, the commonest reason of all first."""
    found: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for record in records:
        found.setdefault((str(record.get("source")), str(record.get("reason"))), []).append(record)
    return [
        Reason(
            source=source,
            reason=reason,
            count=len(some),
            id=str(some[0].get("id")),
            line=some[0].get("line"),
            detail=_cut(str(some[0].get("detail", ""))),
        )
        for (source, reason), some in sorted(found.items(), key=lambda pair: (-len(pair[1]), pair[0]))
    ]


def _cut(text: str) -> str:
    return text if len(text) <= DETAIL_CHARACTERS else text[: DETAIL_CHARACTERS - 1] + "…"
