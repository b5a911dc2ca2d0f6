"""What `nvila run` does when a step meets damaged work: the same command does it again, and says so."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from nvila.components.contracts.environment import Environment
from nvila.components.contracts.errors import DamagedError
from nvila.components.contracts.exits import Exit
from nvila.components.contracts.pipelines import PIPELINES
from nvila.components.contracts.recipe.form import Form
from nvila.components.runner.execute import _Status
from nvila.components.runner.status import Status
from nvila.pipelines.local import run as local

ENDS = ["damaged", "damaged", "rejected"], ["damaged", "damaged", "damaged", "damaged"], ["failed", "damaged"]


@pytest.mark.parametrize(("ends", "calls"), zip(ENDS, (3, 3, 1), strict=True), ids=["mended", "a bad disk", "a fault"])
def test_damaged_work_is_done_again_by_the_same_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], ends: list[str], calls: int
) -> None:
    """Sent home with exit code 1, users start a run of days again by hand; on a bad disk it must end all the same."""
    run_dir = tmp_path / "runs" / "r"
    run_dir.mkdir(parents=True)
    done: list[str] = []

    def watched(*_: Any) -> int:
        how = ends[len(done)]
        done.append(how)
        number = min(len(done), 2)  # the third time it is the same file again
        error = DamagedError("damaged output of step initialize", where=f"store/initialize/{number}.bin")
        code = {"damaged": Exit.FAULT, "rejected": Exit.REJECTED, "failed": Exit.FAULT}[how]
        status = Status.REJECTED if how == "rejected" else Status.FAILED
        _Status(Environment(run=run_dir), "train-1").end(status, code, message=str(error), damaged=how == "damaged")
        return 1

    monkeypatch.setattr(local, "_watched", watched)
    code = local._run_checked(
        Form(recipe="micro"), PIPELINES["lifecycle"], run_dir, tmp_path / "store", local._Stop()
    ).exit_code
    assert (len(done), int(code)) == (calls, 3 if ends[calls - 1] == "rejected" else 1)
    assert capsys.readouterr().out.count("the damaged work is done again") == calls - 1
    assert json.loads((run_dir / "summary.json").read_text())["exit_code"] == int(code)


def test_a_folder_where_the_latest_run_is_named_does_not_end_the_run(tmp_path: Path) -> None:
    """The run is over, its report written; it failed on the name `latest`."""
    (tmp_path / "latest" / "x").mkdir(parents=True)
    (tmp_path / "r").mkdir()
    local._point_latest(tmp_path / "r")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "r"]
