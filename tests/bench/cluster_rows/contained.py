"""Steps of micro in containers beside the same commands in processes: what the container itself costs."""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

from kfp.local.status import Status
from kfp.local.subprocess_task_handler import SubprocessTaskHandler

from nvila.components.contracts.recipe.form import Form, fill_in
from nvila.components.data.demo import ensure

sys.path.append(str(Path(__file__).parents[2] / "infra/images"))
import first_steps

Row = tuple[str, str, float, float, str]


def rows() -> Iterator[Row]:
    """Both run the same commands one after the other; every step is new work in both."""
    if reason := first_steps.why_not():
        print(f"no rows of steps in containers: {reason}", file=sys.stderr)
        return
    before = Path.cwd()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o777)
        os.chdir(folder)
        try:
            for source in fill_in(Form(recipe="micro")).data.sources:
                ensure(source)
            plain = _seconds(folder / "plain", contained=False)
            ours = _seconds(folder / "ours", contained=True)
        finally:
            os.chdir(before)
    for number, step in enumerate(first_steps.STEPS):
        yield f"{step} of micro in a container", "s", plain[number], ours[number], "the same command in a process"


def _seconds(place: Path, *, contained: bool) -> list[float]:
    """Wall-clock time of each task, in order."""
    taken: list[float] = []
    handler = first_steps.InContainers if contained else SubprocessTaskHandler
    with mock.patch.object(handler, "run", _timed(handler.run, taken)):
        first_steps.run_first_steps(place, contained=contained)
    return taken


def _timed(run: Callable[[Any], Status], taken: list[float]) -> Callable[[Any], Status]:
    def timed(task: Any) -> Status:
        began = time.monotonic()
        status = run(task)
        taken.append(time.monotonic() - began)
        return status

    return timed
