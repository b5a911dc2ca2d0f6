"""`make clean` removes what was made here, and nothing that a person put beside it or inside it."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from nvila.components.contracts.errors import ConfigError
from nvila.components.contracts.recipe.data import Source
from nvila.components.data.demo.build import ensure
from nvila.pipelines.commands.clean import busy, clean, main

ROOT = Path(__file__).parents[2]
PIPES: dict[str, int] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}


def _source(folder: Path, scale: float = 0.005) -> Source:
    return Source(name="digits", kind="image", path=str(folder), demo="digits", demo_scale=scale)


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder as runs leave it, with data of a person beside those that were made."""
    ensure(_source(tmp_path / "data" / "tiny" / "digits"))
    for name in ("data/plates/sft.json", "data/tiny-notes.txt", "store/base/k/manifest.json", "runs/r1/summary.json"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("mine")
    return tmp_path


def _names(place: Path) -> set[str]:
    return {path.relative_to(place).as_posix() for path in place.rglob("*") if path.is_file()}


def test_only_what_was_made_goes(place: Path) -> None:
    """`rm -rf data` took a person's own pictures, which README tells everybody to put there."""
    assert clean(place) == []
    assert _names(place) == {"data/plates/sft.json", "data/tiny-notes.txt"}
    assert not (place / "data" / "tiny").exists()
    shutil.rmtree(place / "data")
    assert clean(place) == [] and list(place.iterdir()) == []


@pytest.mark.parametrize("what", ["added", "changed", "linked", "copied stamp"])
def test_a_demonstration_with_a_persons_work_in_it_stays(place: Path, what: str) -> None:
    """A picture of one's own, or a corrected answer, is soon put where the others are."""
    folder = place / "data" / "tiny" / "digits"
    if what == "added":
        (folder / "images" / "own.png").write_bytes(b"own")
    elif what == "changed":
        (folder / "sft.json").write_text((folder / "sft.json").read_text() + " ")
    elif what == "linked":
        (folder / "more").symlink_to(place / "data" / "plates")
    else:
        shutil.copy(folder / "SOURCE.json", place / "data" / "plates")
        folder = place / "data" / "plates"
    before = _names(folder)
    (told,) = clean(place)
    assert folder.relative_to(place).as_posix() in told
    assert _names(folder) == before


def test_a_demonstration_with_a_persons_work_in_it_is_not_replaced(place: Path) -> None:
    """Another scale in the recipe built the folder anew, whatever had been put there."""
    folder = place / "data" / "tiny" / "digits"
    (folder / "own.png").write_bytes(b"own")
    with pytest.raises(ConfigError, match="other files lie here"):
        ensure(_source(folder, 0.01))
    assert (folder / "own.png").exists()


@pytest.mark.parametrize("name", ["store", "runs", "data", "data/tiny", "data/tiny/digits"])
def test_what_lies_behind_a_link_stays(place: Path, tmp_path_factory: pytest.TempPathFactory, name: str) -> None:
    """A link to a large disk may be shared with others; and the link itself is a person's setting."""
    far = tmp_path_factory.mktemp("disk") / "far"
    shutil.move(place / name, far)
    (place / name).symlink_to(far)
    before = _names(far)
    clean(place)
    assert _names(far) == before and (place / name).is_symlink()


def test_an_interrupted_build_goes(place: Path) -> None:
    """Its hidden folder holds gigabytes that nobody sees."""
    (place / "data" / "tiny" / ".clips.building" / "videos").mkdir(parents=True)
    (place / "data" / "tiny" / ".clips.lock").touch()
    clean(place)
    assert not (place / "data" / "tiny").exists()


@pytest.mark.parametrize("lock", ["store/base/.k.lock", "data/tiny/.digits.lock"])
def test_nothing_goes_while_something_is_at_work(place: Path, lock: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A step would go on writing into folders that are gone, or finish half of its work."""
    before = _names(place) | {lock}
    with (place / lock).open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert main(place) == 1
    assert lock in capsys.readouterr().err and _names(place) == before
    assert busy(place) is None


def test_nothing_goes_while_a_run_goes_on(place: Path) -> None:
    """Between two steps no lock is held."""
    words = ["nvila.pipelines.local.child", str(place / "runs" / "r1"), "1"]
    with subprocess.Popen([sys.executable, "-c", "print(1, flush=True); input()", *words], **PIPES) as worker:
        assert worker.stdout and worker.stdout.readline()
        assert "run is going on" in (busy(place) or "")
        assert busy(place / "elsewhere") is None
        worker.communicate(b"\n")
    assert busy(place) is None


def test_the_target_needs_no_environment(place: Path) -> None:
    """Cleaning up is what one does when the environment is broken or gone."""
    for name in ("Makefile", "pyproject.toml"):
        shutil.copy(ROOT / name, place)
    for name in ("components", "pipelines", "infra", "requirements", "tests"):
        (place / name).symlink_to(ROOT / name)
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    subprocess.run(["make", "-s", "clean", f"PYTHON={sys._base_executable} -S"], cwd=place, env=variables, check=True)
    assert (place / "data" / "plates" / "sft.json").read_text() == "mine"
    assert not any((place / name).exists() for name in ("data/tiny", "store", "runs", ".typing"))
