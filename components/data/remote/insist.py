"""How often and how long another service is asked: the limits, the pauses, and the error when it stays away."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from typing import TypeVar

from nvila.components.contracts.errors import NvilaError, Unreachable
from nvila.components.contracts.progress import waiting_for

T = TypeVar("T")
CONNECT_SECONDS = 10
READ_SECONDS = 60
"""Without a byte for so long, a try has failed."""
TRIES = 5
PAUSE_SECONDS = 1.0
"""Before the second try; doubled before each further one, and spread by half so that nodes do not ask in step."""


def insist(attempt: Callable[[], T], passes: Callable[[Exception], bool], where: str) -> T:
    """What `attempt` returns, in at most `TRIES` tries.

    Args:
        attempt: asks the service once.
        passes: whether an error is one that may be gone the next time; any other is raised at once.
        where: what is asked for, for messages.

    Raises:
        Unreachable: the last try failed as well.
    """
    for tried in range(1, TRIES + 1):
        try:
            return attempt()
        except Exception as error:
            if ours := _ours(error):
                raise ours from None
            if not passes(error):
                raise
            if tried == TRIES:
                raise Unreachable(
                    f"no success in {TRIES} tries",
                    where=where,
                    value=said(error),
                    do="Nothing is lost: run the same command again when the service is back.",
                ) from error
            pause = PAUSE_SECONDS * 2 ** (tried - 1) * random.uniform(0.5, 1.5)
            waiting_for(f"{where}: {said(error)}; try {tried + 1} of {TRIES} in {pause:.0f} s")
            time.sleep(pause)
    raise AssertionError("TRIES is at least 1")


def _ours(error: BaseException) -> NvilaError | None:
    """The error of ours that is at the bottom: botocore wraps what a signal handler raises while it waits."""
    seen: BaseException | None = error
    while seen is not None and not isinstance(seen, NvilaError):
        seen = seen.__cause__ or seen.__context__
    return seen


def said(error: BaseException) -> str:
    """The first line of an error, or its class where it has no words."""
    text = str(error).replace(" (reached max retries: 0)", "")  # botocore counts its own, which are switched off
    return next((line.strip() for line in text.splitlines() if line.strip()), type(error).__name__)
