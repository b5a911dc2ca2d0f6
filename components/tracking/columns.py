"""What the columns of MLflow's database take: how long a text may be, and what may stand in it.

sqlite takes anything; Postgres and MySQL refuse what is too long, and NUL, and with it everything that came along.
What is cut here stands whole in a file of the run.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from hashlib import sha256

RUN_NAME, KEY, VALUE, TAG, DESCRIPTION, DATASET_NAME, DATASET_DIGEST = 250, 250, 500, 5000, 5000, 500, 36
"""Characters. Of a value MLflow takes 6,000 and before 2.8 took 500; of a tag 8,000."""
_UNKNOWN = re.compile(r"[\0\ud800-\udfff]")
_FORBIDDEN = re.compile(r"[^\w.\- :/]")
_NOT_IN_A_PATH = re.compile(r"^\.\.|(?:(?<=/)|^)(?:\.{0,2})(?=/|$)")
_NOT_IN_A_MODEL = re.compile(r"[/:.%\"']")


def fitted(text: str, characters: int) -> str:
    """`text` as a column of this length takes it: cut, with a sign of that, and without what no database writes."""
    text = _UNKNOWN.sub("\N{REPLACEMENT CHARACTER}", text)
    return text if len(text) <= characters else text[: characters - 3] + "..."


def key(name: str, taken: Collection[str] = ()) -> str:
    """A name of a parameter or metric as MLflow takes it, and unlike those that are taken.

    MLflow reads a name as a path as well, which may not be another one's: no `..`, nothing empty between `/`.
    """
    found = _NOT_IN_A_PATH.sub("_", _FORBIDDEN.sub("_", name))
    if len(found) > KEY or found in taken:
        found = f"{found[: KEY - 9]}-{sha256(name.encode(errors='surrogatepass')).hexdigest()[:8]}"
    return found


def model_name(name: str) -> str:
    """The name of a logged model, which may hold less than that of a registered one."""
    return fitted(_NOT_IN_A_MODEL.sub("-", name), RUN_NAME)


def excerpt(markdown: str, characters: int, rest: str) -> str:
    """The first lines of a document that fit, and where the rest is."""
    text = fitted(markdown, len(markdown))
    if len(text) <= characters:
        return text
    note = f"\n\n*Cut: {rest}.*\n"
    kept = text[: characters - len(note)]
    return kept.rpartition("\n")[0] + note if "\n" in kept else kept + note
