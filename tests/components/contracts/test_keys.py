"""Content keys: what they see and what they do not."""

import subprocess
import sys
from pathlib import Path

import pytest

from nvila.components.contracts import keys
from nvila.components.contracts.keys import content_key, import_closure, library_versions

TRAIN = "nvila.components.train.step"


@pytest.mark.parametrize(
    ("step", "reached"),
    [
        (TRAIN, "nvila.components.model.projector"),
        (TRAIN, "nvila.components.train.worker"),
        ("nvila.components.prune.step", "nvila.components.model.nvila"),
        ("nvila.components.quantize.step", "nvila.components.model.serving"),
        ("nvila.components.validate.step", "nvila.components.data.media"),
    ],
)
def test_closure_reaches_late_imports_and_started_modules(step: str, reached: str) -> None:
    """Heavy imports lie inside functions, workers are started by name: code there that changes must change the key."""
    assert reached in import_closure(step)


@pytest.mark.parametrize(
    ("step", "foreign"),
    [
        (TRAIN, "nvila.components.evaluate"),
        (TRAIN, "nvila.pipelines"),
        ("nvila.components.validate.step", "nvila.components.model"),
        ("nvila.components.evaluate.step", "nvila.components.train"),
    ],
)
def test_closure_stays_small(step: str, foreign: str) -> None:
    """A needless import makes every edit of the report or the command line train everything anew."""
    assert [name for name in import_closure(step) if name == foreign or name.startswith(foreign + ".")] == []


def test_closure_executes_nothing() -> None:
    """Computing the key of a skipped step must not import torch."""
    code = (
        "import sys; from nvila.components.contracts.keys import content_key\n"
        f"content_key({TRAIN!r}, {{}}, {{}}); print('torch' in sys.modules)"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "False"


def test_edited_code_changes_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any file of the closure counts, however deep."""
    before = content_key(TRAIN, {}, {})
    edited = import_closure(TRAIN)["nvila.components.model.s2"]
    real = keys._file_digest
    monkeypatch.setattr(keys, "_file_digest", lambda path: "other" if path == edited else real(path))
    assert content_key(TRAIN, {}, {}) != before


def test_library_versions_are_those_of_what_the_code_imports() -> None:
    """An upgraded torch must repeat training, an upgraded library that the step does not use must not."""
    found = library_versions(import_closure("nvila.components.quantize.step").values())
    assert {"torch", "transformers", "llmcompressor"} <= set(found)
    assert not {"kfp", "typer", "great_expectations"} & set(found)


def test_key_depends_on_each_part() -> None:
    """Two executions with one key would do the same work; everything else differs."""
    module = "nvila.components.evaluate.gate"
    same = content_key(module, {"a": 1, "b": 2}, {"x": "1"}, {"f": "1"})
    assert content_key(module, {"b": 2, "a": 1}, {"x": "1"}, {"f": "1"}) == same, "order of keys does not matter"
    others = [
        content_key("nvila.components.resolve.step", {"a": 1, "b": 2}, {"x": "1"}, {"f": "1"}),
        content_key(module, {"a": 1, "b": 3}, {"x": "1"}, {"f": "1"}),
        content_key(module, {"a": 1, "b": 2}, {"x": "2"}, {"f": "1"}),
        content_key(module, {"a": 1, "b": 2}, {"y": "1"}, {"f": "1"}),
        content_key(module, {"a": 1, "b": 2}, {"x": "1"}, {"f": "2"}),
    ]
    assert len({same, *others}) == 6


def test_key_does_not_depend_on_where_the_package_lies(tmp_path: Path) -> None:
    """The store is shared between checkouts and machines."""
    code = f"from nvila.components.contracts.keys import content_key; print(content_key({TRAIN!r}, {{}}, {{}}))"
    root = Path(__file__).parents[3]
    (tmp_path / "nvila").mkdir()
    for name in ("components", "pipelines"):
        (tmp_path / "nvila" / name).symlink_to(root / name)
    printed = {
        subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=True).stdout
        for folder in (root, tmp_path)
    }
    assert len(printed) == 1
