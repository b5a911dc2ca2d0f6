"""The error family: what a message holds, and that it survives the way between processes."""

from __future__ import annotations

import pickle

import pytest

from nvila.components.contracts.errors import DataError, NvilaError
from nvila.components.data.media import MediaError  # noqa: F401 - so that its class is known


def family(kind: type[NvilaError] = NvilaError) -> list[type[NvilaError]]:
    return [kind, *(member for child in kind.__subclasses__() for member in family(child))]


@pytest.mark.parametrize("kind", family())
def test_an_error_arrives_whole_in_another_process(kind: type[NvilaError]) -> None:
    """An error that cannot be unpickled takes its message with it: the user sees a crash of the pool instead."""
    error = kind.__new__(kind)
    NvilaError.__init__(error, "too big", where="a.png", value=9, do="Make it smaller.")
    found = pickle.loads(pickle.dumps(error))
    assert type(found) is kind and str(found) == str(error)
    assert (found.what, found.where, found.value, found.do) == ("too big", "a.png", 9, "Make it smaller.")
    assert found.exit_code == kind.exit_code


def test_a_message_says_what_where_which_and_what_to_do() -> None:
    """A message without the file or the value sends the user searching."""
    error = DataError("cannot be read", where="a.json:3", value="x" * 999, do="Mend it.")
    assert str(error).startswith("a.json:3: cannot be read (got 'xxx")
    assert str(error).endswith("...). Mend it.")
    assert len(str(error)) < 260
