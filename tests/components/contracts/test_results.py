"""The form of results: one per step, refused where it is another's, the same digest in later versions."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from telling import evaluation, scored, training

from nvila.components.contracts import manifest as manifests
from nvila.components.contracts import steps
from nvila.components.contracts.errors import DamagedError, DataError
from nvila.components.contracts.manifest import Manifest
from nvila.components.contracts.results.accuracy import Evaluation
from nvila.components.contracts.results.model import Training
from nvila.components.contracts.results.result import Measured, Other, Result
from nvila.components.contracts.store import Store
from nvila.components.tracking.flatten import metrics


def saved(folder: Path, step: str, result: Result | None = None) -> Path:
    path = folder / "m.json"
    Manifest(step=step, key="k", kind="model", result=result).save(path)
    return path


def test_a_result_comes_back_as_it_was(tmp_path: Path) -> None:
    """What a reader gets of another type, or rounded, is another result."""
    told = evaluation({"digits": scored(0.7)}, {"base": {"digits": 0.1}})
    read = Manifest.load(saved(tmp_path, "evaluate", told))
    assert read.told(Evaluation) == told and read.digest == Manifest.load(tmp_path / "m.json").digest


def test_the_result_of_another_step_is_damage(tmp_path: Path) -> None:
    """A manifest that fits nobody's form was written by hand; an attribute error later is no message."""
    with pytest.raises(ValueError, match="result"):
        Manifest(step="train-1", key="k", kind="model", result=evaluation({}))
    path = saved(tmp_path, "other", Other(**evaluation({}).model_dump()))
    content = json.loads(path.read_text()) | {"step": "train-1"}
    path.write_text(json.dumps(content))
    with pytest.raises(DamagedError, match="no Training's"):
        Manifest.load(path)
    with pytest.raises(DamagedError, match=r"no Training of train-1.*Run the recipe again"):
        Manifest.load(saved(tmp_path, "train-1")).told(Training)


def test_a_field_that_is_new_leaves_older_digests_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weeks of work were damaged on the day that a result learnt to tell one thing more."""

    class More(Training):
        gpu_hours: float | None = None

    path = saved(tmp_path, "train-1", training())
    monkeypatch.setitem(steps.ROWS, "train-1", replace(steps.ROWS["train-1"], result=More))
    read = Manifest.load(path)
    assert isinstance(read.result, More) and read.digest == json.loads(path.read_text())["digest"]


def test_work_of_an_older_version_is_done_again_and_kept_from_readers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run that ends on what last month's version left would never end well; a walk over it has to say why."""
    store = Store(tmp_path)
    with store.working("train-1", "k") as folder:
        (folder / "manifest.json").write_text('{"schema_version": 1, "step": "train-1", "values": {}, "digest": "d"}')
    assert store.finished("train-1", "k") is None
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "older version" in said and "schema 1" in said and "damaged" not in said
    with pytest.raises(DataError, match=r"written by an older version .*schema 1; this one reads schema 2"):
        store.load(folder / "manifest.json")


def test_measured_values_keep_their_names_in_mlflow() -> None:
    """Whoever compares runs of two versions does it by these names."""
    told = metrics(evaluation({"digits": scored(0.7)}, {"base": {"digits": 0.1}}))
    assert told["accuracy/digits/accuracy"] == 0.7 and told["accuracy/digits/n"] == 1000
    assert told["accuracy/digits/question_only/accuracy"] == 0.3
    assert told["stages/base/digits/accuracy"] == 0.1
    assert not [name for name in told if "value" in name or "metric" in name]


@pytest.mark.parametrize("kind", dict.fromkeys([*(row.result for row in steps.STEPS if row.result != Other), Measured]))
def test_a_result_is_frozen_and_takes_no_more(kind: type[Result]) -> None:
    """A key that nobody reads is a mistake that nobody sees."""
    assert kind.model_config["frozen"] and kind.model_config["extra"] == "forbid"


def test_the_version_is_the_models() -> None:
    """A reader that says another version than it writes sends people in circles."""
    assert Manifest(step="a", key="k", kind="model").schema_version == manifests.SCHEMA_VERSION


@pytest.mark.parametrize("wrong", [{"n": True}, {"n": "9"}, {"n": 9.0}, {"value": True}, {"value": float("nan")}])
def test_a_result_takes_no_value_of_another_type(wrong: dict[str, object]) -> None:
    """A step that tells `True` for a count would be read as 1, and nobody would find its mistake."""
    right = {"metric": "accuracy", "value": 0.5, "low": 0, "high": 1, "n": 9}
    assert Measured.model_validate(right).high == 1.0
    with pytest.raises(ValueError, match=f"for Measured\n{next(iter(wrong))}\n"):
        Measured.model_validate(right | wrong)
