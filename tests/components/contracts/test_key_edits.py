"""What runs again after an edit, tried on a copy of the tree: ten edits by name, and random ones of training code."""

from __future__ import annotations

import ast
import io
import re
import shutil
import tokenize
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nvila.components.contracts import keys

ROOT = Path(__file__).parents[3]
TRAIN = "nvila.components.train.step"
MODULES = sorted(
    {
        module
        for wrapper in ROOT.glob("components/*/component.py")
        for module in re.findall(r'"(nvila\.components\.[\w.]+)"', wrapper.read_text(encoding="utf-8"))
    }
)
NOTHING = ""
MODEL = "evaluate evaluate_quantized initialize prune quantize register train"
EDITS = {
    # what: file under components, what stands there, what then stands there, the steps that run again
    "a remark": ("model/vision/projector.py", "class Projector", "# Two layers.\nclass Projector", NOTHING),
    "a docstring": ("train/schedule.py", '"""Factor on', '"""What multiplies', NOTHING),
    "an exit code": ("contracts/exits.py", "    DONE = 0\n", "    DONE = 0\n    LATE = 4\n", NOTHING),
    "how JSON answers are spaced": ("model/decode/structured.py", '": "', '":"', NOTHING),
    "how answers are decoded": (
        "model/decode/generation.py",
        "argmax(dim=-1)",
        "argmin(dim=-1)",
        "evaluate evaluate_quantized prune register",
    ),
    "the projector": ("model/vision/projector.py", "nn.GELU()", "nn.ReLU()", f"{MODEL} preflight rollout"),
    "the learning rate": ("train/schedule.py", "0.5 *", "0.4 *", "train"),
    "what the vision tower loses": ("quantize/smooth.py", "1e-5", "1e-4", "quantize"),
    "the report's page": ("report/page.html", "<html", "<html dir='ltr'", "report"),
    "a recipe": ("../pipelines/recipes/tiny.yaml", "seed: 0", "seed: 1", "resolve"),
}
"""A step behind one that runs again does so too where that one's result is another."""


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A copy of the package, which keys are made of as long as this module's tests run."""
    copy = tmp_path_factory.mktemp("tree")
    for name in ("components", "pipelines"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            keys.importlib.util,
            "find_spec",
            lambda name: SimpleNamespace(submodule_search_locations=[str(copy / name.split(".")[1])]),
        )
        forget()
        yield copy
    forget()


def forget() -> None:
    for cached in (keys._source, keys._syntax):
        cached.cache_clear()


def key(module: str) -> str:
    forget()
    return keys.content_key(module, {}, {})


@pytest.fixture(scope="module")
def before(tree: Path) -> dict[str, str]:
    """The key of each step's code."""
    return {module: key(module) for module in MODULES}


@pytest.mark.parametrize("edit", EDITS)
def test_what_runs_again_after_an_edit(tree: Path, before: dict[str, str], edit: str) -> None:
    """A key that misses an edit serves an old result; one that sees too much trains five stages for a template."""
    name, old, new, again = EDITS[edit]
    path = tree / "components" / name
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new, 1), encoding="utf-8")
    try:
        forget()
        changed = [module for module in MODULES if keys.content_key(module, {}, {}) != before[module]]
    finally:
        path.write_text(text, encoding="utf-8")
    assert {module.removeprefix("nvila.components.").removesuffix(".step") for module in changed} == set(again.split())


def test_training_reaches_no_answers(tree: Path) -> None:
    """How models answer, are served, fetched and judged is worked on while others train for weeks."""
    reached = {name.split(".")[2] for name in keys.import_closure(TRAIN) if name.count(".") >= 2}
    assert reached == {"contracts", "data", "model", "precision", "train"}
    for room in ("nvila.components.model.decode", "nvila.components.data.remote"):
        assert room not in keys.import_closure(TRAIN)


def test_no_step_reads_a_docstring(tree: Path) -> None:
    """Docstrings are not in the key: one that reached an output would change it unseen."""
    for path in {path for module in MODULES for path in keys.import_closure(module).values()}:
        for node in ast.walk(ast.parse(Path(path).read_bytes())):
            read = node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""
            assert read not in ("__doc__", "getdoc", "model_json_schema", "json_schema"), path
            assert not (isinstance(node, ast.Attribute) and read == "description"), path


def training_code(tree: Path) -> list[Path]:
    closure = keys.import_closure(TRAIN).items()
    return [Path(path) for name, path in closure if name.split(".")[2:3] in (["train"], ["model"], ["data"])]


@settings(max_examples=25, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_a_change_of_any_line_of_training_code_trains_again(
    tree: Path, before: dict[str, str], data: st.DataObject
) -> None:
    """Training code that the key does not see serves weights that it did not make."""
    path = data.draw(st.sampled_from(training_code(tree)))
    text = path.read_text(encoding="utf-8")
    if not (places := list(_values(text))):
        return
    line, start, end = data.draw(st.sampled_from(places))
    lines = text.splitlines(keepends=True)
    lines[line] = f"{lines[line][:start]}({lines[line][start:end]}+1){lines[line][end:]}"
    assert _key_with(path, "".join(lines), text) != before[TRAIN], lines[line]


@settings(max_examples=25, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_what_is_said_in_any_line_of_training_code_trains_nothing(
    tree: Path, before: dict[str, str], data: st.DataObject
) -> None:
    """A comment, a blank line, or a docstring that costs a week of GPUs is not written."""
    path = data.draw(st.sampled_from(training_code(tree)))
    text = path.read_text(encoding="utf-8")
    lines = text.splitlines(keepends=True)
    tokens = list(tokenize.generate_tokens(io.StringIO(text).readline))
    ends = [token.start for token in tokens if token.type == tokenize.NEWLINE]
    alone = {(n.lineno, n.col_offset) for n in ast.walk(ast.parse(text)) if isinstance(n, ast.Expr)}
    documented = [t.start for t in tokens if t.string.startswith('"""') and t.start in alone]  # others are values
    line, column = data.draw(st.sampled_from(ends + documented))
    if (line, column) in documented:
        lines[line - 1] = lines[line - 1].replace('"""', '"""Besides: ', 1)
    else:
        lines[line - 1] = f"{lines[line - 1][:column]}  # {data.draw(st.text('ab ', max_size=9))}\n\n# more\n"
    assert _key_with(path, "".join(lines), text) == before[TRAIN], lines[line - 1]


def _key_with(path: Path, changed: str, text: str) -> str:
    path.write_text(changed, encoding="utf-8")
    try:
        return key(TRAIN)
    finally:
        path.write_text(text, encoding="utf-8")


def _values(text: str) -> Iterator[tuple[int, int, int]]:
    """Line, first and last column of names that are read and of numbers, where code is that runs."""
    tree = ast.parse(text)
    typing = {
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        read = isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)
        number = isinstance(node, ast.Constant) and isinstance(node.value, (int, float))
        if (read or number) and node not in typing and text.isascii() and node.lineno == node.end_lineno:
            yield node.lineno - 1, node.col_offset, node.end_col_offset or 0
