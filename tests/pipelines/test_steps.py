"""The step table against what it speaks of: wrappers, settings, recipe; and nothing else may know a step's name."""

from __future__ import annotations

import ast
import inspect
import re
import types
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any, Union, get_args, get_origin, get_type_hints

import pytest

from nvila.components.contracts.recipe.recipe import Recipe
from nvila.components.contracts.steps import ROWS, STEPS, Step, nearest
from nvila.components.runner.image import IMAGE, QUANTIZE_IMAGE
from nvila.pipelines.build import component

ROOT = Path(__file__).parents[2]
SLICED = [row for row in STEPS if row.recipe]
OTHERS = {
    "components/contracts/recipe/recipe.py": {"register"},
    "components/contracts/recipe/form.py": {"register", "rollout"},
    "components/register/step.py": {"register"},
    "components/contracts/manifest.py": {"report"},
    "components/preflight/step.py": {"report"},
    "components/report/step.py": {"report"},
    "components/report/close_run.py": {"report"},
    "pipelines/show/results.py": {"report"},
    "infra/controller/loop.py": {"rollout"},
    "infra/controller/tell.py": {"rollout"},
    "infra/images/build.py": {"quantize"},
}
"""The same words as names of other things: sections of the recipe, kinds of manifests, a file, an image, a label."""


def test_rows_stand_behind_what_they_wait_for() -> None:
    """The pipeline is built, and the picture drawn, from top to bottom: a name that is not there yet is a typo."""
    known: set[str] = set()
    for row in STEPS:
        assert row.before <= known and row.name not in known, row.name
        assert row.hands_on in ("", *row.inputs), row.name
        known.add(row.name)


@pytest.mark.parametrize("row", STEPS, ids=lambda row: row.name)
def test_wrapper_is_what_its_row_says(row: Step) -> None:
    """KFP reads the wrapper's text, the plan reads the row: another module or input name is another content key."""
    wrapper: Any = component(row)
    source = inspect.getsource(wrapper.python_func)
    assert re.findall(r'execute\(\s*step, "([\w.]+)"', source) == [row.module]
    inputs = {name: not spec.optional for name, spec in wrapper.component_spec.inputs.items() if "@" in spec.type}
    needed = {name for name, is_needed in inputs.items() if is_needed} - {"slices"}
    assert set(inputs) >= set(row.inputs) >= needed
    outputs = {name: output.type for name, output in wrapper.component_spec.outputs.items() if "@" in output.type}
    pages = {"system.HTML@0.0.1", "system.Markdown@0.0.1"}
    assert {kind for name, kind in outputs.items() if name != row.output} <= pages and row.output in outputs
    images = {"main": IMAGE, "quantize": QUANTIZE_IMAGE}
    assert wrapper.component_spec.implementation.container.image == images[row.image]


@pytest.mark.parametrize("row", SLICED, ids=lambda row: row.name)
def test_settings_are_sections_of_the_recipe(row: Step) -> None:
    """A field that is defined a second time drifts: quantize believed a gate's number that no recipe had."""
    fields = import_module(row.module).Settings.model_fields
    assert {field.alias or name for name, field in fields.items()} == set(row.recipe)
    for name, field in fields.items():
        kinds = set(_members(field.annotation))
        assert set(_members(_kind(row.recipe[field.alias or name]))) - {type(None)} <= kinds, name


def _kind(path: str) -> Any:
    """Type of what stands at a dotted path of the recipe."""
    kind: Any = Recipe
    for part in path.split("."):
        if part.isdigit():
            (kind,) = get_args(kind)
        elif part in kind.model_fields:
            kind = kind.model_fields[part].annotation
        else:
            kind = get_type_hints(getattr(kind, part).fget)["return"]
    return kind


def _members(kind: Any) -> tuple[Any, ...]:
    return get_args(kind) if get_origin(kind) in (types.UnionType, Union) else (kind,)


def test_only_the_table_knows_the_names() -> None:
    """A name written in a second place is forgotten when a step comes or goes."""
    found = [
        f"{path}:{line}: {text!r}"
        for root in ("components", "pipelines", "infra")
        for path in (ROOT / root).rglob("*.py")
        if path.name != "component.py" and path != ROOT / "components/contracts/steps.py"
        for line, text in _strings(path)
        if text not in OTHERS.get(path.relative_to(ROOT).as_posix(), ())
    ]
    assert found == []


def _strings(path: Path) -> Iterator[tuple[int, str]]:
    """Constants that are a step's name, or the beginning of numbered ones."""
    stems = {re.sub(r"\w+$", "", name) for name in ROWS if "-" in name}
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value in {*ROWS, *stems}:
            yield node.lineno, node.value


def test_what_is_implied_is_not_drawn() -> None:
    """The picture would be full of lines: nearly every step reads the samples."""
    found = nearest()
    assert found["train-5"] == ("prune-video", "train-4") and found["quantize"] == ("gate",)
