"""Records that are left out are named, and only so many may be."""

from __future__ import annotations

import pytest

from nvila.components.contracts.errors import DataError
from nvila.components.contracts.exits import Exit
from nvila.components.contracts.results.result import SkippedRecords
from nvila.components.data.skipped import Skipped, Tally


@pytest.mark.parametrize(("records", "share", "allowed"), [(32, 0.01, 1), (100, 0.07, 7), (100, 0.0, 0), (3, 1.0, 3)])
def test_a_share_is_rounded_up_as_it_is_written(records: int, share: float, allowed: int) -> None:
    """0.07 * 100 is above 7; and one record of few would be too many for any share of a per cent."""
    tally = Tally("x", records, share, quiet=True)
    tally.add(Skipped(f"a/{n}", "gone") for n in range(allowed))
    tally.add(Skipped(f"a/{n}", "gone") for n in range(allowed))  # met again in the next pass
    assert tally.summary().records == allowed
    with pytest.raises(DataError) as caught:
        tally.add([Skipped("b/1", "gone")])
    assert caught.value.exit_code == Exit.USER


def test_the_commonest_reasons_come_first() -> None:
    """A wrong mount takes every file; the user must see that, and not the one odd record before it."""
    tally = Tally("stage x", 10, 0.2, quiet=True)
    with pytest.raises(DataError, match=r"^stage x: 4 of 10 .*, 2 may: no file \(3: a/1 in /m/1, .*; odd \(1: z/1\)"):
        tally.add([Skipped("z/1", "odd"), *(Skipped(f"a/{n}", "no file", f"/m/{n}") for n in (1, 2, 3))])


def test_the_log_names_the_first_records(capsys: pytest.CaptureFixture[str]) -> None:
    """Ten thousand lines drown the log, none leaves the user without a name."""
    tally = Tally("stage x", 1000, 0.5)
    tally.add(Skipped(f"a/{n:03}", "gone", f"/m/{n}") for n in range(300))
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 10 and lines[0] == "stage x: skipped a/000: gone (/m/0)"
    assert tally.summary() == SkippedRecords(records=300, first=[f"a/{n:03}: gone (/m/{n})" for n in range(10)])
