"""A verdict (exit code 2 or 3) stays within a run on a cluster, where KFP starts every pod that fails three times."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from nvila.components.contracts.errors import ConfigError, DataError, NvilaError, Preempted, Rejected
from nvila.components.contracts.manifest import Manifest
from nvila.components.contracts.recipe.section import Section
from nvila.components.contracts.results.run import Resolution
from nvila.components.contracts.step import Outcome
from nvila.components.resolve import step as resolve_step
from nvila.components.runner import execute as runner

RESOLVE = "nvila.components.resolve.step"
FORM = {"recipe": "tinny", "data_uri": "", "model_name": "", "keep_ratio": 0.0, "target": "", "overrides": {}}


class Nothing(Section):
    """Nothing to set."""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder of a run on a cluster; `nvila.trying` is a step that came through unless a test changes it."""
    step = ModuleType("nvila.trying")
    step.Settings = Nothing  # type: ignore[attr-defined]
    step.run = lambda settings, inputs, out: Outcome(kind="dataset")  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "nvila.trying", step)
    monkeypatch.setattr(runner, "content_key", lambda *_: "0" * 64)
    monkeypatch.setattr(runner, "_track", lambda *_: None)
    monkeypatch.setattr(runner.signal, "signal", lambda *_: None)
    run = tmp_path / "runs" / "id-1"
    for name, value in (("NVILA_STORE", tmp_path / "store"), ("NVILA_RUN", run), ("NVILA_RUN_ID", "id-1")):
        monkeypatch.setenv(name, str(value))
    yield run


def pod(run: Path, step: str = "try", module: str = "nvila.trying", **given: Any) -> tuple[int, str, Any]:
    """A pod of the step: its exit code, and what the status file says then."""
    arguments = {"slices": None, "inputs": {}, "settings": {}, **given}
    try:
        runner.execute(step, module, output=str(run / "out.json"), **arguments)
        code = 0
    except SystemExit as leaving:
        code = int(str(leaving.code))
    record = json.loads((run / "steps" / f"{step}.json").read_text())
    return code, record["status"], record["message"]


def test_a_wrong_recipe_name_is_looked_up_once(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`resolve` has no content key without the recipe's text, so it left no tombstone and ran three times."""
    calls: list[str] = []
    plain = resolve_step.run
    monkeypatch.setattr(
        resolve_step, "run", lambda form, inputs, out, here: calls.append("run") or plain(form, inputs, out, here)
    )
    first, second, third = (pod(place, "resolve", RESOLVE, settings=FORM) for _ in range(3))
    assert first == second == third
    assert first[:2] == (2, "failed") and "no recipe of that name" in first[2] and "tiny" in first[2]
    assert calls == ["run"]


def test_a_wrong_recipe_name_has_a_tombstone(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A mistake in the form is all there is to know of it: it stays one without a cluster, too."""
    monkeypatch.delenv("NVILA_RUN_ID")
    pod(place, "resolve", RESOLVE, settings=FORM)
    assert len(list(place.parent.parent.glob("store/resolve/*/tombstone.json"))) == 1


def hooks(step: ModuleType, name: str, error: Exception) -> list[str]:
    """Have the step's function `name` fail; the list grows with each call."""
    calls: list[str] = []

    def fail(*_: Any) -> None:
        calls.append(name)
        raise error

    setattr(step, name, fail)
    return calls


@pytest.mark.parametrize("name", ["prepare", "external", "run"])
@pytest.mark.parametrize(
    ("error", "code"), [(DataError("no sft.json"), 2), (ConfigError("wrong"), 2), (Rejected("no"), 3)]
)
def test_whatever_says_no_is_asked_once(place: Path, name: str, error: NvilaError, code: int) -> None:
    """Digests of a terabyte of files were taken three times to say three times that one is missing."""
    calls = hooks(sys.modules["nvila.trying"], name, error)
    first, second = pod(place), pod(place)
    assert first == second and first[0] == code and first[2] == str(error)
    assert calls == [name]


@pytest.mark.parametrize("error", [ZeroDivisionError("oops"), NvilaError("no space"), Preempted("moved")])
def test_what_may_go_better_is_tried_again(place: Path, error: Exception) -> None:
    """A machine that was asked to stop, or a disk that was full, is what retries are for."""
    calls = hooks(sys.modules["nvila.trying"], "external", error)
    assert pod(place)[0] == pod(place)[0] != 0
    assert len(calls) == 2


def test_steps_that_always_run_end_at_once_as_well(place: Path) -> None:
    """They ask for no tombstone, so a refused rollout was served, asked and refused three times."""
    calls = hooks(sys.modules["nvila.trying"], "run", Rejected("worse than the champion"))
    assert pod(place, "rollout") == pod(place, "rollout") == (3, "rejected", "worse than the champion")
    assert len(calls) == 1


def no_slice(run: Path) -> dict[str, Any]:
    Manifest(step="resolve", key="k", kind="slices", result=Resolution(recipe={}, slices={})).save(run / "slices.json")
    return {"slices": str(run / "slices.json")}


def test_what_the_recipe_does_not_hold_stays_so(place: Path) -> None:
    """An error before any of the step's own code ran."""
    given = no_slice(place)
    first = pod(place, **given)
    assert first[:2] == (2, "failed") and pod(place, **given) == first
    assert pod(place) == first  # though the pod is given what it lacked


def test_other_code_is_refused_once(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The image does not change between two pods of a run."""
    monkeypatch.setenv("NVILA_CODE", "0" * 16)
    first = pod(place)
    assert first[0] == 2 and "other code" in first[2] and pod(place) == first


def test_a_person_who_starts_it_again_has_mended_something(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without KFP nobody retries by themselves: the same command must look again."""
    monkeypatch.delenv("NVILA_RUN_ID")
    calls = hooks(sys.modules["nvila.trying"], "external", DataError("no sft.json"))
    assert pod(place)[0] == 2
    sys.modules["nvila.trying"].external = lambda settings: {}  # type: ignore[attr-defined]
    assert pod(place)[0] == 0 and len(calls) == 1


def test_another_run_looks_again(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """**Clone run** is how a person tries again on a cluster."""
    calls = hooks(sys.modules["nvila.trying"], "external", DataError("no sft.json"))
    pod(place)
    monkeypatch.setenv("NVILA_RUN", str(place.parent / "id-2"))
    pod(place.parent / "id-2")
    assert len(calls) == 2


@pytest.mark.parametrize("left", ["", "{", "[]", "null", '{"exit_code": 99}', '{"exit_code": "2"}', "\ud800"])
def test_a_damaged_status_file_is_no_verdict(place: Path, left: str) -> None:
    """A node that goes down leaves files of any content."""
    (place / "steps").mkdir(parents=True)
    (place / "steps" / "try.json").write_bytes(left.encode("utf-8", "surrogatepass"))
    assert pod(place)[0] == 0
