"""The distribution holds what the checkout holds."""

import subprocess
import sys
import sysconfig
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
ROOTS = ("components", "pipelines", "infra")


def _pyproject() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def test_every_package_of_the_tree_is_listed() -> None:
    """A forgotten sub-package would be there in the checkout and missing in the image."""
    there = {
        "nvila." + ".".join(init.parent.relative_to(ROOT).parts)
        for root in ROOTS
        for init in (ROOT / root).rglob("__init__.py")
    }
    assert set(_pyproject()["tool"]["setuptools"]["packages"]) == there


def test_every_folder_with_code_is_a_package() -> None:
    """A folder without `__init__.py` works in an editable install and is lost in a wheel."""
    folders = {path.parent for root in ROOTS for path in (ROOT / root).rglob("*.py")}
    assert [str(folder) for folder in folders if not (folder / "__init__.py").is_file()] == []


def test_the_wheel_works_elsewhere(tmp_path: Path) -> None:
    """Templates, style sheets and recipes must travel with the wheel; imports must not lean on the checkout."""
    # A copy, because setuptools writes `build/` beside the sources.
    copy = tmp_path / "copy"
    copy.mkdir()
    for name in (*ROOTS, "pyproject.toml", "README.md"):
        subprocess.run(["cp", "-r", str(ROOT / name), str(copy / name)], check=True)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    options = ["--no-deps", "--no-build-isolation", "--no-index", "--target", str(tmp_path / "site")]
    subprocess.run([*pip, "install", *options, str(copy)], check=True, cwd=tmp_path)
    data = {
        path.relative_to(ROOT)
        for root in ROOTS
        for path in (ROOT / root).rglob("*")
        if path.is_file() and path.suffix not in (".py", ".pyc")
    }
    missing = [str(path) for path in data if not (tmp_path / "site" / "nvila" / path).is_file()]
    assert missing == []
    # -S leaves out the editable install's hook, so that only the wheel's copy can be found.
    code = (
        f"import sys; sys.path[:0] = [{str(tmp_path / 'site')!r}, {sysconfig.get_path('purelib')!r}]\n"
        "import nvila.pipelines.cli, nvila.pipelines.build as build\n"
        "from nvila.components.contracts.recipe.form import Form, fill_in\n"
        "print(build.__file__, fill_in(Form(recipe='tiny')).name)"
    )
    ran = subprocess.run([sys.executable, "-I", "-S", "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.split() == [str(tmp_path / "site/nvila/pipelines/build.py"), "tiny"]
