"""What is too long to try every day takes turns, by the date; `make test-every` tries all of it.

A failure that began on another day is found when its turn comes, and its name says how to run it alone.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import TypeVar

T = TypeVar("T")
EVERY = "EVERY_TEST" in os.environ
TODAY = datetime.now(UTC).toordinal()


def turn_of(days: int, day: int) -> bool:
    """Whether it is the turn of what is tried on this day of so many: chosen by hand, so that days are equally long."""
    return EVERY or TODAY % days == day


def some(things: Sequence[T], count: int) -> list[T]:
    """So many of them, other ones each day, or all."""
    return list(things) if EVERY else [things[(TODAY * count + i) % len(things)] for i in range(count)]
