"""Content keys: what must change them, and what must not."""

from __future__ import annotations

import ast
import importlib.util
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from nvila.components.contracts import keys
from nvila.components.contracts.neutral import NEUTRAL
from nvila.components.contracts.syntax import read_syntax

STEP = "nvila.trial.step"
FILES = {
    "__init__.py": "",
    "step.py": "from nvila.trial.near import helper\n\ndef run():\n    from nvila.trial import late\n    return late\n",
    "near.py": "import nvila.trial.far\nhelper = 1\n",
    "far.py": "far = 1\n",
    "late.py": "import subprocess\nsubprocess.run(['python', '-m', 'nvila.trial.started'])\n",
    "started.py": "import yaml\n",
    "unrelated.py": "import torch\n",
}


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A step of our namespace in a folder of its own."""
    folder = tmp_path / "nvila" / "trial"
    folder.mkdir(parents=True)
    for name, text in FILES.items():
        (folder / name).write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    forget()
    yield folder
    forget()


def forget() -> None:
    """A process sees one version of the code; a test sees several."""
    for cached in (keys._source, keys._syntax):
        cached.cache_clear()


def key(settings: dict[str, Any] | None = None, inputs: dict[str, str] | None = None, **external: Any) -> str:
    forget()
    return keys.content_key(STEP, settings or {"a": 1}, inputs or {"data": "d1"}, external)


@pytest.mark.usefixtures("package")
@pytest.mark.parametrize(
    "other",
    [
        lambda: key({"a": 2}),
        lambda: key({"a": 1, "b": None}),
        lambda: key(inputs={"data": "d2"}),
        lambda: key(inputs={"model": "d1"}),
        lambda: key(files="changed"),
    ],
    ids=["a value", "a new setting", "an input's digest", "an input's name", "the user's files"],
)
def test_whatever_the_work_depends_on_changes_the_key(other: Callable[[], str]) -> None:
    """A key that misses a dependency serves an old result as a new one."""
    assert key() == key()
    assert other() != key()


@pytest.mark.parametrize("name", ["step.py", "near.py", "far.py", "late.py", "started.py", "__init__.py"])
def test_own_code_at_any_depth_changes_the_key(package: Path, name: str) -> None:
    """A fix in code that is imported late, or started as a process by its name, must run the step again."""
    before = key()
    (package / name).write_text(FILES[name] + "another = 1\n")
    assert key() != before


@pytest.mark.parametrize("name", ["step.py", "near.py", "late.py", "__init__.py"])
def test_what_is_said_in_code_does_not_change_the_key(package: Path, name: str) -> None:
    """A remark that trains five stages again is a remark that nobody writes."""
    before = key()
    (package / name).write_text(f'"""What it is for."""\n# why\n\n{FILES[name]}"""Of what stands above."""\n')
    assert key() == before


def test_files_that_steps_read_change_the_key(package: Path) -> None:
    """A page made from yesterday's template, or a run of yesterday's recipe, would pass for today's."""
    before = key()
    (package / "page.html").write_text("<p>")
    first = key()
    (package / "page.html").write_text("<p> ")
    (package / ".page.html.swp").touch()
    assert len({before, first, key()}) == 3
    (package / ".page.html.swp").unlink()
    assert len({before, first, key()}) == 3


def test_what_only_type_checkers_import_is_left_out(package: Path) -> None:
    """Types are never executed: they would tie a step to code that it does not run."""
    (package / "near.py").write_text("from typing import TYPE_CHECKING\nhelper = 1\n")
    before = key()
    (package / "near.py").write_text(
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from nvila.trial import unrelated\nhelper = 1\n"
    )
    assert key() == before


@pytest.mark.parametrize(
    "text",
    [
        "from . import unrelated\n",
        "from .unrelated import x\n",
        "from ..trial.unrelated import x\n",
        "try:\n    import nvila.trial.unrelated\nexcept ImportError:\n    pass\n",
        "if helper:\n    from nvila.trial import unrelated as other\n",
        "from importlib import import_module\nimport_module('nvila.trial.unrelated')\n",
        "from importlib import import_module\nimport_module(f'nvila.trial.{helper}')\n",
        "from nvila.trial import *\n",
    ],
)
def test_however_a_module_is_imported_it_counts(package: Path, text: str) -> None:
    """A way to import that the walk does not know hides whatever is imported by it."""
    for name in ("near.py", "__init__.py"):
        (package / name).write_text(f"helper = 1\n{text}")
        before = key()
        (package / "unrelated.py").write_text("import torch\nx = 2\n")
        assert key() != before
        (package / name).write_text(FILES[name])
        (package / "unrelated.py").write_text(FILES["unrelated.py"])


def test_an_entry_point_in_a_string_counts() -> None:
    """vLLM imports our architecture by its name: nothing else would tell that the quantized model is computed by it."""
    closure = keys.import_closure("nvila.components.evaluate_quantized.step")
    assert {"nvila.components.serve.plugin", "nvila.components.serve.architecture"} <= set(closure)


@pytest.mark.parametrize("module", sorted(NEUTRAL))
def test_a_neutral_module_brings_nothing_along(module: str) -> None:
    """Whatever a module of the list imports would leave the key with it, unseen."""
    spec = importlib.util.find_spec(module)
    assert spec and spec.origin
    imported = read_syntax(Path(spec.origin).read_bytes()).imported
    ours = {name for name in imported if keys._source(name)} if imported else set()
    others = (
        {name.partition(".")[0] for name in imported} - {"nvila", "psutil", "pydantic"} - set(sys.stdlib_module_names)
    )
    assert ours <= NEUTRAL | {module.rpartition(".")[0]} and not others


def test_unrelated_code_does_not_change_the_key(package: Path) -> None:
    """A key over the whole package would train five stages again for a comma in the report."""
    before = key()
    (package / "unrelated.py").write_text("import numpy\n")
    (package / "new.py").write_text("")
    assert key() == before


@pytest.mark.usefixtures("package")
def test_versions_of_the_libraries_used_change_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    """Results of another version of a library are other results; of a library that is not used, the same."""
    before = key()

    def pretend(other: str) -> None:
        monkeypatch.setattr(keys, "version", lambda name: "0.0" if name.lower() == other else version(name))

    pretend("pyyaml")
    assert key() != before
    pretend("torch")
    assert key() == before


def test_the_real_train_step_is_seen_whole() -> None:
    """The worker runs under torchrun and is imported by nobody: without it an engine could change unseen."""
    closure = keys.import_closure("nvila.components.train.step")
    assert {f"nvila.components.train.{name}" for name in ("step", "launch", "loop", "engine", "data")} <= set(closure)
    assert not {f"nvila.components.{other}.step" for other in ("evaluate", "register", "initialize")} & set(closure)
    libraries = keys.library_versions(closure.values())
    assert {"torch", "deepspeed", "transformers"} <= set(libraries)


def test_a_key_is_found_without_running_the_code() -> None:
    """Importing torch to learn that nothing is to do costs ten seconds a step."""
    code = (
        "import sys\nfrom nvila.components.contracts.keys import content_key\n"
        "content_key('nvila.components.train.step', {}, {})\nprint('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_forms_of_results_compute_nothing() -> None:
    """They are not in the key: one that rounded a value would change what a step tells, unseen."""
    for module in sorted(name for name in NEUTRAL if ".contracts.results." in name):
        path = keys._source(module)
        assert path
        for node in ast.walk(ast.parse(Path(path).read_bytes())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
                assert isinstance(node, ast.FunctionDef), path
                assert [ast.unparse(one) for one in node.decorator_list] == ["property"], f"{path}: {node.name}"


def test_data_lie_in_packages() -> None:
    """A template in a folder of its own would be read by a step and seen by no key."""
    root = Path(__file__).parents[3]
    for room in ("components", "pipelines"):
        for path in (root / room).rglob("*"):
            if path.is_file() and path.suffix not in (".py", ".pyc"):
                assert (path.parent / "__init__.py").is_file(), path
