"""What MLflow recorded of a step is held against what the store says now."""

from __future__ import annotations

from pathlib import Path

import pytest
from telling import evaluation, scored

from nvila.components.contracts.errors import Rejected
from nvila.components.contracts.manifest import Manifest
from nvila.components.contracts.store import Store
from nvila.components.tracking import recorded
from nvila.components.tracking.recorded import compare
from nvila.components.tracking.runs import record_step


def away(runs: Path) -> None:
    raise ConnectionError("no server")


@pytest.fixture
def measured(tmp_path: Path, tracked_run: Path) -> Manifest:
    """The metrics of an evaluation that MLflow knows."""
    with Store(tmp_path / "store").working("evaluate", "k" * 64) as folder:
        made = Manifest(step="evaluate", key="k" * 64, kind="metrics", result=evaluation({"digits": scored(0.2)}))
        made = Store(tmp_path / "store").finish(folder, made)
    record_step(tracked_run, "evaluate", {}, {}, made, 0.0, 1.0, None, {})
    return made


def test_an_edited_manifest_with_a_new_digest_is_refused(
    tracked_run: Path, measured: Manifest, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whoever can write the store writes 0.99 into the metrics, and a digest that fits."""
    compare(tracked_run.parent, "gate", {"metrics": measured})
    assert capsys.readouterr().err == ""
    forged = measured.model_copy(update={"result": evaluation({"digits": scored(0.99)})})
    with pytest.raises(Rejected, match=r"evaluate.*is not the one that MLflow recorded.*Remove .*store/evaluate"):
        compare(tracked_run.parent, "gate", {"metrics": forged})


def test_work_done_twice_with_different_results_is_known_twice(tracked_run: Path, measured: Manifest) -> None:
    """With other threads the same work rounds differently; both results were recorded."""
    again = measured.model_copy(update={"result": evaluation({"digits": scored(0.21)})})
    record_step(tracked_run, "evaluate", {}, {}, again, 0.0, 1.0, None, {})
    for one in (measured, again):
        compare(tracked_run.parent, "gate", {"metrics": one})


def test_without_a_record_it_goes_on_and_says_so(
    tmp_path: Path, tracked_run: Path, measured: Manifest, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """A tracking server that was away for an hour must not cost the run that it missed."""
    compare(tracked_run.parent, "gate", {"metrics": measured.model_copy(update={"key": "other"})})
    compare(tmp_path / "no-runs", "gate", {"metrics": measured})
    assert capsys.readouterr().err.count("MLflow has no record of evaluate; the store alone is believed") == 2
    assert not (tmp_path / "no-runs").exists()
    monkeypatch.setattr(recorded, "connected", away)
    compare(tracked_run.parent, "gate", {"metrics": measured})
    assert "not compared with MLflow" in capsys.readouterr().err
