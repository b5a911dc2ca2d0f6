"""Work of an interrupted attempt is believed only as it was written."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from nvila.components.contracts.sealed import fault, seal


@pytest.fixture
def sealed(tmp_path: Path) -> Path:
    folder = tmp_path / "made"
    (folder / "deep").mkdir(parents=True)
    (folder / "deep" / "weights").write_bytes(b"12345678")
    (folder / "config [1].json").write_text("{}")
    (folder / "scratch").write_text("not of it")
    seal(folder, folder / "record.json", ["deep/**/*", "*.json"])
    return folder


def test_what_is_as_it_was_written_is_believed(sealed: Path) -> None:
    """Work done again for nothing; or files that were never part of it deciding."""
    assert fault(sealed, sealed / "record.json", ["deep/**/*"]) is None
    (sealed / "scratch").unlink()
    assert fault(sealed, sealed / "record.json", ["deep/**/*"]) is None


def _link(path: Path) -> None:
    """Put a link to the same bytes in the place of a file or a folder."""
    path.rename(path.parent.parent / "elsewhere")
    path.symlink_to(path.parent.parent / "elsewhere")


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda at: (at / "deep/weights").write_bytes(b"1234567"), "deep/weights: it has 7 bytes and had 8"),
        (lambda at: (at / "deep/weights").write_bytes(b"12345679"), "deep/weights: its bytes are not those"),
        (lambda at: (at / "config [1].json").unlink(), r"config \[1\].json: it is gone"),
        (lambda at: _link(at / "deep/weights"), "deep/weights: weights is a link"),
        (lambda at: _link(at / "deep"), "deep/weights: deep is a link"),
        (lambda at: (at / "deep/more").symlink_to("weights"), "deep/more: the step wrote no such file"),
        (lambda at: (at / "record.json").write_text(""), "record.json is damaged"),
        (lambda at: (at / "record.json").write_text("[]"), "record.json is damaged"),
        (lambda at: (at / "record.json").write_text('{"a": 1}'), "record.json is damaged"),
        (lambda at: (at / "record.json").write_bytes(b"\xff\xfe"), "record.json is damaged"),
        (lambda at: (at / "record.json").write_text("{}"), "record.json names no file"),
        (lambda at: (at / "record.json").unlink(), "record.json is not there"),
    ],
)
def test_what_is_not_is_named(sealed: Path, damage: Callable[[Path], object], said: str) -> None:
    """A folder whose name says that it is finished, with files that a power cut has emptied."""
    damage(sealed)
    with pytest.raises(AssertionError, match=said):
        raise AssertionError(fault(sealed, sealed / "record.json", ["deep/**/*"]))
