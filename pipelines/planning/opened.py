"""A sample of every source, opened as `validate` does: the first records of each annotation file, and their media."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from nvila.components.contracts.errors import DataError
from nvila.components.contracts.recipe.data import LABELS, DataSettings, Source, Validation

RECORDS = 16
"""Of each annotation file."""


@dataclass(frozen=True)
class Opened:
    """What a look at one source found."""

    source: str
    records: int
    """How many were opened."""
    whole: bool
    """Whether that is all of them."""
    spoilt: int
    reasons: Mapping[str, int]
    """Why, the commonest first."""
    example: str | None
    """The first spoilt record, and what is wrong with it."""
    refused: bool
    """Whether `validate` would stop the run: of one file not a record is good, or all were opened and too few are."""

    @property
    def words(self) -> str:
        """In a line."""
        which = f"all {self.records}" if self.whole else f"the first {self.records}"
        if not self.spoilt:
            return f"{self.source}: {which} records were opened and are good"
        why = ", ".join(f"{number} {reason}" for reason, number in self.reasons.items())
        return f"{self.source}: of {which} records {self.spoilt} would go to quarantine ({why}), as {self.example}"


def open_samples(data: DataSettings) -> list[Opened]:
    """A look at every source whose files are here."""
    there = [source for source in data.sources if Path(source.path).is_dir()]
    return [opened for source in there if (opened := _open(source, data.validation))]


def _open(source: Source, limits: Validation) -> Opened | None:
    from nvila.components.validate.annotations import read_label_rows, read_records
    from nvila.components.validate.judge import allowed, judge
    from nvila.components.validate.measures import look_at_media

    try:
        files = source.annotations()
        everything = [read_records(source, split, path) for split, path in files.items() if split != LABELS]
        named = read_label_rows(source, files[LABELS]) if LABELS in files else []
    except DataError:  # preflight says it
        return None
    records, labels = [row for rows in everything for row in rows[:RECORDS]], named[:RECORDS]
    look_at_media([source], records, labels, limits)
    _, quarantine = judge([source], records, labels, limits)
    reasons = Counter(line["reason"] for line in quarantine.values())
    first = next(iter(quarantine.values()), None)
    opened, spoilt = len(records) + len(labels), len(quarantine)
    whole = opened == sum(map(len, everything)) + len(named)
    lost = Counter(line["split"] for line in quarantine.values() if line["split"] != LABELS)
    hopeless = any(lost[split] == number for split, number in Counter(row["split"] for row in records).items())
    too_many = lost.total() > allowed(limits.max_quarantined_share, len(records))
    return Opened(
        source=source.name,
        records=opened,
        whole=whole,
        spoilt=spoilt,
        reasons=dict(reasons.most_common()),
        example=f"{first['id']}: {first['detail']}" if first else None,
        refused=hopeless or (whole and too_many),
    )
