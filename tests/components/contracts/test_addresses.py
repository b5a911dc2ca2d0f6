"""Names of folders mean nothing in a URL."""

from __future__ import annotations

import ast
import re
import sqlite3
from pathlib import Path

import pytest

from nvila.components.contracts.addresses import below, file_path, file_url, http_url, sqlite_url

ROOT = Path(__file__).resolve().parents[3]
NAMES = (
    *("a b", "a%20b", "job%2Fmain", "100%", "a#b", "a?b", "a&b=c", "a;b", "a+b", "a:b@c", "a'b", 'a"b', "$HOME", "~"),
    *("-r", "[x]", "{a,b}", "a\\b", "a\nb", "täst 日本", "ends ", ".", "%"),
)
BY_HAND = re.compile(r"sqlite:///|file://|http://$")
TOLD = re.compile(r"sqlite:///|file://|http://|as_uri")


@pytest.mark.parametrize("name", NAMES)
def test_a_name_means_nothing_in_a_url(name: str, tmp_path: Path) -> None:
    """`%20` in a folder's name was read as a space, and what lies behind `?` as options: the work went elsewhere."""
    from mlflow.utils.file_utils import local_file_uri_to_path
    from sqlalchemy import create_engine, text

    folder = tmp_path / name
    folder.mkdir(exist_ok=True)
    assert file_path(file_url(folder)) == folder == Path(local_file_uri_to_path(file_url(folder)))
    assert file_path(below(file_url(tmp_path), name)) == folder
    assert below("s3://bucket/place/", name) == f"s3://bucket/place/{name}"
    engine = create_engine(sqlite_url(folder / "x.db"))
    with engine.begin() as connection:
        connection.execute(text("CREATE TABLE found (n INTEGER)"))
    engine.dispose()
    with sqlite3.connect(folder / "x.db") as there:
        assert there.execute("SELECT name FROM sqlite_master").fetchall() == [("found",)]


def test_what_is_no_file_has_no_path() -> None:
    """A bucket's key must not be opened on this machine."""
    assert [file_path(url) for url in ("s3://b/x", "mlflow-artifacts:/0", "/plain/path")] == [None, None, None]


def test_an_ipv6_address_stands_in_brackets() -> None:
    """`http://::1:8321` is no URL; nobody could ask what was printed."""
    assert http_url("::1", 8321) == "http://[::1]:8321"
    assert http_url("127.0.0.1", 8321) == "http://127.0.0.1:8321"


def test_no_other_code_builds_such_urls() -> None:
    """What is put together by hand works until somebody's folder has a `%` in its name."""
    found = set()
    parts = [path for part in ("components", "pipelines", "infra") for path in (ROOT / part).rglob("*.py")]
    for path in parts:
        text = path.read_text(encoding="utf-8")
        for node in ast.walk(ast.parse(text)) if TOLD.search(text) else ():
            texts = [n for n in node.values if isinstance(n, ast.Constant)] if isinstance(node, ast.JoinedStr) else ()
            by_hand = any(BY_HAND.search(str(text.value)) for text in texts)
            if by_hand or (isinstance(node, ast.Attribute) and node.attr == "as_uri"):
                found.add(path.relative_to(ROOT).as_posix())
    assert found == {"components/contracts/addresses.py"}
