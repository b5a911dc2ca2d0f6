"""Who may import whom, what may be imported at the top, and what a wrapper may hold."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

NOUNS: dict[str, set[str]] = {
    "contracts": set(),
    "data": {"contracts"},
    "tracking": {"contracts", "data"},
    "kube": {"contracts", "tracking"},
    "model": {"contracts", "data"},
    "precision": {"contracts", "model"},
    "metrics": {"contracts", "data", "model"},
    "serve": {"contracts", "data", "model"},
    "runner": {"contracts", "tracking"},
}
"""Libraries under components/ and the libraries that each may import."""
STEPS = {path.parent.name for path in ROOT.glob("components/*/component.py")}
HEAVY = (
    "torch",
    "transformers",
    "deepspeed",
    "mlflow",
    "great_expectations",
    "pandas",
    "pyarrow",
    "numpy",
    "sklearn",
    "av",
    "PIL",
    "llmcompressor",
    "matplotlib",
    "vllm",
    "torchao",
    "transformer_engine",
)
WRAPPERS = sorted(ROOT.glob("components/*/component.py"))


def _imports(path: Path, tree: ast.AST | None = None) -> Iterator[str]:
    for node in ast.walk(tree or ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield f"{'.' * node.level}{node.module or ''}"
            yield from (f"{'.' * node.level}{node.module or ''}.{alias.name}" for alias in node.names)


def _part(module: str) -> str | None:
    """`nvila.components.model.vision.s2` -> `model`, `nvila.pipelines.cli` -> `pipelines`, others -> None."""
    parts = module.split(".")
    if parts[0] != "nvila" or len(parts) < 2:
        return None
    return parts[2] if parts[1] == "components" and len(parts) > 2 else parts[1]


def _allowed(part: str) -> set[str]:
    if part in NOUNS:
        return NOUNS[part] | {part}
    if part in STEPS:
        return set(NOUNS) | {part}
    everything = set(NOUNS) | STEPS | {"components", "pipelines"}
    return everything | {"infra"} if part == "infra" else everything


def test_dependencies_point_one_way() -> None:
    """A step that imports a step, or a library that imports a step, makes every content key depend on everything."""
    wrong = []
    for path in sorted(p for root in ("components", "pipelines", "infra") for p in (ROOT / root).rglob("*.py")):
        parts = path.relative_to(ROOT).parts
        own = parts[1] if parts[0] == "components" and len(parts) > 2 else parts[0]
        wrong += [
            f"{path.relative_to(ROOT)} imports {module}"
            for module in _imports(path)
            if (part := _part(module)) is not None and part not in _allowed(own) and part != "components"
        ]
    assert wrong == []


def test_every_folder_of_components_is_a_noun_or_a_step() -> None:
    """A new folder must be given a place in the order before anything can import it."""
    folders = {path.parent.name for path in ROOT.glob("components/*/__init__.py")}
    assert folders == set(NOUNS) | STEPS


def test_no_relative_and_no_bare_imports() -> None:
    """The same file imported under two names is two modules with two of every class."""
    wrong = [
        f"{path.relative_to(ROOT)}: {module}"
        for root in ("components", "pipelines", "infra", "tests")
        for path in (ROOT / root).rglob("*.py")
        for module in _imports(path)
        if module.startswith(".") or module.split(".")[0] in ("components", "pipelines", "infra")
    ]
    assert wrong == []


LIGHT = (
    [
        "nvila." + ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for path in sorted((ROOT / "pipelines").rglob("*.py"))
        if path.stem != "__init__"
    ]
    + [f"nvila.components.{path.parent.name}.component" for path in WRAPPERS]
    + [
        "nvila." + ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for path in sorted((ROOT / "components/contracts").rglob("*.py"))
        if path.stem != "__init__"
    ]
    + ["nvila.components.runner.execute"]
)


STEP_MODULES = [f"nvila.components.{step}.step" for step in sorted(STEPS)]


@pytest.mark.parametrize("modules", [LIGHT, STEP_MODULES], ids=["light", "steps"])
def test_nothing_heavy_is_imported_early(modules: list[str]) -> None:
    """Torch takes ten seconds: a command line, a compile or a step that is then skipped must not pay for it."""
    code = (
        "import importlib, json, sys\n"
        f"heavy, found = {HEAVY!r}, {{}}\n"
        f"for name in {modules!r}:\n"
        "    importlib.import_module(name)\n"
        "    for top in heavy:\n"
        "        if top in sys.modules: found.setdefault(top, name)\n"
        "print(json.dumps(found))"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "{}", "heavy modules and the first module after which they were there"


@pytest.mark.parametrize("path", WRAPPERS, ids=lambda path: path.parent.name)
def test_wrappers_are_imports_and_calls(path: Path) -> None:
    """Logic in a wrapper would run untested, outside the content key, and as text inside the compiled pipeline."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
    assert functions, "no wrapper"
    assert len(path.read_text(encoding="utf-8").splitlines()) < 100
    for function in functions:
        for statement in function.body[1:]:
            assert isinstance(statement, (ast.Import, ast.ImportFrom, ast.Assign, ast.Expr, ast.Return)), (
                f"{path.parent.name}: {ast.unparse(statement)}"
            )
        calls = [n for n in ast.walk(function) if isinstance(n, ast.Call) and getattr(n.func, "id", "") == "execute"]
        assert len(calls) == 1, f"{function.name} must call execute once"
        docstring = function.body[0]
        assert isinstance(docstring, ast.Expr) and isinstance(docstring.value, ast.Constant), (
            "the docstring comes first"
        )


def test_modules_of_tests_have_names_of_their_own() -> None:
    """pytest imports them by their bare name: of two with one name, the second was not run at all."""
    names = [path.name for path in ROOT.glob("tests/**/test_*.py")]
    assert {name for name in names if names.count(name) > 1} == set()


def test_what_tests_import_has_a_name_of_its_own() -> None:
    """Of two helpers with one name, the second was the first: a file of tests could not be read, once all were run."""
    files = [path for path in ROOT.glob("tests/**/*.py") if path.name not in ("conftest.py", "__init__.py")]
    names = [path.stem for path in files]
    imported = {name.split(".")[0] for path in files for name in _imports(path)}
    assert {name for name in names if names.count(name) > 1} & imported == set()
