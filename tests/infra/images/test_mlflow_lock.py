"""The image of the MLflow server holds what the server requires, in the versions that runs were tested with."""

from __future__ import annotations

import re
from importlib.metadata import distribution
from pathlib import Path

from packaging.requirements import Requirement

REQUIREMENTS = Path(__file__).parents[3] / "requirements"
ROOTS = ("mlflow", "boto3", "Flask-WTF", "prometheus-flask-exporter", "psycopg2-binary")
"""The server; artifacts in S3, users, metrics and Postgres."""


def test_the_lock_is_the_servers_part_of_the_main_one() -> None:
    """A library that a new MLflow asks for would be missing when the server starts, in the cluster and not before."""
    main = {_name(line): line for line in _lines("main.lock")}
    assert _lines("mlflow.lock") == sorted((main[name] for name in _required(*ROOTS)), key=str.lower)


def _required(*roots: str) -> set[str]:
    """The distributions that these need, with themselves."""
    found: set[str] = set()
    wanted = list(roots)
    while wanted:
        if (name := _name(wanted.pop())) in found:
            continue
        found.add(name)
        for text in distribution(name).requires or ():
            needed = Requirement(text)
            if needed.marker is None or needed.marker.evaluate({"extra": ""}):
                wanted.append(needed.name)
    return found


def _name(line: str) -> str:
    return re.sub(r"[-_.]+", "-", line.partition("==")[0]).lower()


def _lines(lock: str) -> list[str]:
    return [line for line in (REQUIREMENTS / lock).read_text().splitlines() if line and not line.startswith("#")]
