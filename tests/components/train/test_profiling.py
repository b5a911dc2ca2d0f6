"""Profiles of a stage's steps."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from nvila.components.contracts.errors import ConfigError
from nvila.components.train.profiling import Profile


@pytest.mark.parametrize(("steps", "profiled"), [(9, [3, 4, 5]), (4, [2, 3, 4]), (1, [1])])
def test_steps_behind_the_first_are_profiled(tmp_path: Path, steps: int, profiled: list[int]) -> None:
    """The first steps are those that no other is like; and of a stage with fewer steps there was no profile at all."""
    profile = Profile(tmp_path, steps)
    for number in range(1, steps + 1):
        with torch.profiler.record_function(f"step {number}"):
            torch.ones(4, 4) @ torch.ones(4, 4)
        profile.step()
    events = json.loads((tmp_path / "profile" / "trace.json").read_text())["traceEvents"]
    names = [event.get("name") for event in events]
    assert [number for number in range(1, steps + 1) if f"step {number}" in names] == profiled
    assert "aten::mm" in (tmp_path / "profile" / "table.txt").read_text()


def test_a_stage_that_is_not_there_is_refused(tmp_path: Path) -> None:
    """A run of hours that profiled nothing because of a slip of the pen."""
    from nvila.pipelines.local.run import run

    with pytest.raises(ConfigError, match=r"--profile: no such stage .*train-6.*train-1, .*, all"):
        run("micro", runs=tmp_path, store=tmp_path, profile="train-6")
    assert not list(tmp_path.iterdir())
