"""The digest of a Python file: what it must say, and that every Python we run on says the same."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from nvila.components.contracts import syntax
from nvila.components.contracts.syntax import read_syntax

SAMPLE = Path(__file__).parent / "syntax_sample.txt"
STORED = "0fc5ec02dbe559c741e63b5739ae00f10bc9247c795a30e85ce706779438d902"
"""Of SAMPLE. Another digest here means that everything that anybody has trained runs again."""


def digest(source: str) -> str:
    return read_syntax(source.encode()).sha256


def test_the_digest_of_the_sample_is_the_stored_one() -> None:
    """A walk that another Python makes otherwise would train everything again after an upgrade."""
    assert read_syntax(SAMPLE.read_bytes()).sha256 == STORED


@pytest.mark.parametrize("minor", [11, 12, 13])
def test_other_pythons_agree(minor: int) -> None:
    """The image's Python and the one of whoever plans the run must find the same work in one store."""
    places = [Path("/usr/bin"), *Path.home().glob(f".pyenv/versions/3.{minor}.*/bin"), Path(sys.executable).parent]
    python = next((place / f"python3.{minor}" for place in places if (place / f"python3.{minor}").exists()), None)
    if python is None:
        pytest.skip(f"no Python 3.{minor} here")
    program = (
        "import runpy, sys, pathlib\n"
        f"read = runpy.run_path({syntax.__file__!r})['read_syntax']\n"
        "for path in sys.argv[1:]: print(read(pathlib.Path(path).read_bytes()).sha256)\n"
    )
    files = [SAMPLE, *sorted(Path(syntax.__file__).parents[1].glob("train/*.py"))]
    said = subprocess.run([python, "-c", program, *files], capture_output=True, text=True, check=True).stdout.split()
    assert said == [read_syntax(file.read_bytes()).sha256 for file in files]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("x = 1", "x = 1.0"),
        ("x = 1", "x = True"),
        ("x = 'a'", "x = b'a'"),
        ("x = None", "x = ()"),
        ("f(a, b)", "f(a, *b)"),
        ("def f(*, a, b=1): pass", "def f(*, a=1, b): pass"),
        ("{**a, b: c}", "{a: c, **b}"),
        ("f'{x!r}'", "f'{x}'"),
        ("f'{x:>3}'", "f'{x:<3}'"),
        ("if a:\n  b\n  c", "if a:\n  b\nc"),
        ("def f(): return 'a'", "def f(): 'a'"),
        ("import a.b", "import a"),
        ("x: int = 1", "x: str = 1"),
        ("async def f(): pass", "def f(): pass"),
        ("if TYPE_CHECKING:\n  a\nelse:\n  b", "if TYPE_CHECKING:\n  a\nelse:\n  c"),
    ],
)
def test_other_work_has_another_digest(one: str, other: str) -> None:
    """A field that the walk leaves out, though it says something, hides a change."""
    assert digest(one) != digest(other)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("x = 1  # why", "x = 1"),
        ("x = (1 +\n 2)", "\n\nx = 1 + 2"),
        ("x = 'a' 'b'", 'x = "ab"'),
        ("x = 0x10", "x = 16"),
        ("def f():\n  '''What.'''\n  return 1", "def f():\n  return 1"),
        ("class A:\n  a: int\n  '''What.'''", "class A:\n  a: int"),
        ("if TYPE_CHECKING:\n  import a", ""),
    ],
)
def test_the_same_work_has_the_same_digest(one: str, other: str) -> None:
    """How a thing is written must not run it again."""
    assert digest(one) == digest(other)
