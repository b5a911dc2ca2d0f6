"""Records that turn out to be unusable while a step works: named, counted, and bearable up to a share."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction

from nvila.components.contracts.errors import DataError
from nvila.components.contracts.results.result import SkippedRecords
from nvila.components.contracts.text import say

NAMED = 10
"""Records that the log and the manifest name one by one."""


@dataclass(frozen=True)
class Skipped:
    """A record that was left out."""

    id: str
    reason: str
    """Without what is special of this record, so that records with the same trouble can be counted."""
    where: str | None = None
    """The file, where one is to blame."""

    @classmethod
    def of(cls, record: str, error: DataError) -> Skipped:
        """The record that raised `error`."""
        return cls(record, error.what, error.where)

    def __str__(self) -> str:
        return f"{self.id}: {self.reason}" + (f" ({self.where})" if self.where else "")


class Tally:
    """Counts skipped records, each once however often it is met, and says their names."""

    def __init__(self, what: str, records: int, share: float, *, quiet: bool = False) -> None:
        """`what` names the work, `records` is the number it has, `share` of them may be unusable (rounded up)."""
        self.what, self.records, self.share = what, records, share
        self.allowed = math.ceil(Fraction(str(share)) * records)
        self._quiet = quiet
        self._met: dict[str, Skipped] = {}

    @property
    def met(self) -> list[Skipped]:
        """The records, in the order they were met."""
        return list(self._met.values())

    def add(self, skipped: Iterable[Skipped]) -> None:
        """Count what was skipped.

        Raises:
            DataError: more than the share allows.
        """
        for one in skipped:
            if one.id in self._met:
                continue
            self._met[one.id] = one
            if not self._quiet and len(self._met) <= NAMED:
                say(f"{self.what}: skipped {one}")
        if len(self._met) > self.allowed:
            raise DataError(
                f"{len(self._met)} of {self.records} records cannot be used, {self.allowed} may: {self._reasons()}",
                where=self.what,
                do=f"Repair or remove them, or raise train.max_skipped_share ({self.share})",
            )

    def summary(self) -> SkippedRecords:
        """For the manifest: how many records, and the first ones with their reasons."""
        named = sorted(self._met.values(), key=lambda one: one.id)[:NAMED]
        return SkippedRecords(records=len(self._met), first=[str(one) for one in named])

    def _reasons(self) -> str:
        """The commonest reasons, each with its number of records and the first of them."""
        by_reason: dict[str, list[Skipped]] = {}
        for one in self._met.values():
            by_reason.setdefault(one.reason, []).append(one)
        commonest = sorted(by_reason.items(), key=lambda pair: -len(pair[1]))[:3]
        return "; ".join(f"{reason} ({len(some)}: {_names(some)})" for reason, some in commonest)


def _names(some: list[Skipped]) -> str:
    named = ", ".join(f"{one.id} in {one.where}" if one.where else one.id for one in some[:3])
    return named + (", ..." if len(some) > 3 else "")
