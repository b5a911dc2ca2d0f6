"""The changes of docs/extend.md, each made on a copy of the tree: which files it takes, and that it then works."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml
from turns import some

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs/extend.md"
COPIED = ("components", "pipelines", "infra", "tests", "requirements")
STALE = """\
{patch} does not apply to this tree any more: {why}
Make it anew in a clean tree (docs/extend.md, "When a patch is stale"):
  git apply --3way {patch}      # mend what conflicts
  git diff -U1 HEAD > ../new.patch && git reset --hard && mv ../new.patch {patch}"""

TOGETHER = """\
import sys
import pytest
from nvila.pipelines.cli import main
test, *options = sys.argv[1:]
if code := pytest.main(["-q", "-p", "no:cacheprovider", test]):
    sys.exit(code)
for words in (["plan", "micro", *options], ["compile", "lifecycle.yaml"]):
    sys.argv = ["nvila", *words]
    try:
        main()
    except SystemExit as ended:
        if ended.code:
            raise
"""
"""A patch's test, the plan and the compilation in one process: torch and KFP take seconds to import."""


@dataclass(frozen=True)
class Change:
    """One change that a stranger may want to make."""

    name: str
    """Of its patch."""
    most: int
    """Files that it may take, other than tests, README, golden files and base recipes."""
    options: tuple[str, ...] = ()
    """Of `nvila plan micro`, so that it is used."""
    shown: str = ""
    """What the plan then says."""

    @property
    def patch(self) -> Path:
        """What it changes, as `git apply` reads it."""
        return ROOT / "tests/extend" / f"{self.name}.patch"

    @property
    def touched(self) -> list[str]:
        """Every file of the patch."""
        return re.findall(r"^diff --git a/(\S+) ", self.patch.read_text(encoding="utf-8"), re.MULTILINE)

    @property
    def counted(self) -> list[str]:
        """Those that a person has to know of."""
        return [name for name in self.touched if not name.startswith("tests/") and name not in base_recipes()]


CHANGES = (
    Change("metric", 2, ("-o", 'evaluate.metrics={"digits": "anls"}')),
    Change("stage", 2, shown="train-6"),
    Change("layout", 2),
    Change("target", 2, ("-o", "rollout.target=alias")),
    Change("precision", 3, ("-o", "train.precision=bf16-mixed")),
)

CHOSEN = some(CHANGES, 2)
"""Two a day, since each takes most of a minute."""


def base_recipes() -> list[str]:
    """Recipes that extend no other; the rest inherit what is written there."""
    recipes = sorted((ROOT / "pipelines/recipes").glob("*.yaml"))
    return [path.relative_to(ROOT).as_posix() for path in recipes if "extends" not in yaml.safe_load(path.read_text())]


def copied(to: Path) -> Path:
    """A copy of the tree, with the links by which `nvila` is found in it."""
    for name in COPIED:
        shutil.copytree(ROOT / name, to / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", to)
    (to / ".typing/nvila").mkdir(parents=True)
    for name in ("components", "pipelines", "infra"):
        (to / ".typing/nvila" / name).symlink_to(to / name)
    return to


def applied(change: Change, tree: Path, *options: str) -> None:
    """Make the change in a copy; with `--check`, see whether it can be made.

    Raises:
        AssertionError: the tree has moved on; says how to refresh the patch.
    """
    environment = os.environ | {"GIT_CEILING_DIRECTORIES": str(tree.parent)}
    ran = subprocess.run(
        ["git", "apply", *options, change.patch], cwd=tree, env=environment, capture_output=True, text=True
    )
    patch = change.patch.relative_to(ROOT)
    assert ran.returncode == 0, STALE.format(patch=patch, why=ran.stderr.strip())


def environment(tree: Path) -> dict[str, str]:
    """Variables by which a process finds the copy and nothing else of ours."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("NVILA_", "MLFLOW_", "KUBE"))}
    return kept | {"PYTHONPATH": str(tree / ".typing"), "OMP_NUM_THREADS": "1", "COLUMNS": "120"}


def run(tree: Path, *command: str) -> str:
    """What the interpreter prints in the copy, as the copy has it.

    Raises:
        AssertionError: it fails.
    """
    ran = subprocess.run([sys.executable, *command], cwd=tree, env=environment(tree), capture_output=True, text=True)
    assert ran.returncode == 0, f"{' '.join(command)}\n{ran.stdout[-4000:]}\n{ran.stderr[-4000:]}"
    return ran.stdout


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.name)
def test_the_page_says_what_the_patch_takes(change: Change) -> None:
    """A page that names fewer files than it takes sends a stranger hunting; a rule that has grown copies shows here."""
    section = next(part for part in PAGE.read_text(encoding="utf-8").split("\n## ") if change.patch.name in part)
    said, names = re.findall(r"^\*\*(\d+) files?\*\*: (.+?)(?:, and|\.$)", section, re.MULTILINE | re.DOTALL)[0]
    assert re.findall(r"`([^`]+)`", names) == change.counted and int(said) == len(change.counted)
    assert len(change.counted) <= change.most
    for name in change.touched:
        assert name.startswith("tests/") or f"`{name}`" in section


def test_every_patch_applies(tmp_path: Path) -> None:
    """A patch that has gone stale is found the day that it does."""
    tree = copied(tmp_path / "tree")
    for change in CHANGES:
        applied(change, tree, "--check")


@pytest.mark.parametrize("change", CHOSEN, ids=lambda change: change.name)
def test_the_change_works(change: Change, tmp_path: Path) -> None:
    """It lints, plans, compiles, and its own test shows the new thing at work."""
    tree = copied(tmp_path / "tree")
    applied(change, tree)
    modules = [name for name in change.touched if name.endswith(".py")]
    (test,) = (name for name in change.touched if name.startswith("tests/"))
    run(tree, "-m", "ruff", "check", *modules)
    run(tree, "-m", "ruff", "format", "--check", *modules)
    said = run(tree, "-c", TOGETHER, test, *change.options)
    assert "1 passed" in said and "would refuse" not in said and change.shown in said
    assert (tree / "lifecycle.yaml").is_file()
