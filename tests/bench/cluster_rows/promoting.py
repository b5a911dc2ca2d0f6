"""How quick and how dear a promotion is: of the night test's cells that were played, and of the controller at rest.

Cells: `make night` in `.ci/cluster` writes them to runs/night. At rest: one model, then twenty, that serve on the test
cluster.
"""

from __future__ import annotations

import json
import os
import re
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

sys.path.append(str(Path(__file__).parents[2] / "night"))
from ground import NEEDED, Ground, prepared
from night import OUT
from stage import STAND_IN, Stage

from nvila.components.serve.server import get

Row = tuple[str, str, float, float, str]
MODELS = 20
REST_SECONDS = 30.0
MOST = "the most that is allowed"
_SUM = re.compile(r"^nvila_controller_round_seconds_(sum|count) (\S+)$", re.MULTILINE)


def rows() -> Iterator[Row]:
    """What cells have shown, then what the controller takes."""
    yield from _of_cells([json.loads(path.read_text()) for path in sorted(OUT.glob("*.json"))])
    if missing := [name for name in NEEDED if not os.environ.get(name)]:
        print(f"no rows of the controller: {', '.join(missing)} not set", file=sys.stderr)
        return
    with prepared() as ground:
        for models in (1, MODELS):
            yield from _at_rest(ground, models)


def _of_cells(cells: list[dict[str, float]]) -> Iterator[Row]:
    if not cells:
        print(f"no rows of promotions: no cell in {OUT}, see `make night`", file=sys.stderr)
        return
    played = f"of {len(cells)} cells"
    deployed = [cell["deployed_seconds"] for cell in cells if cell["deployed_seconds"] is not None]
    back = [cell["back_seconds"] for cell in cells if cell["back_seconds"] is not None]
    if deployed:
        yield f"alias set until the Deployment exists, median {played}", "s", 5.0, statistics.median(deployed), MOST
    if back:
        yield f"first share until a bad version has none, median {played}", "s", 15.0, statistics.median(back), MOST
        yield f"first share until a bad version has none, longest {played}", "s", 60.0, max(back), MOST
    asked, lost = (sum(cell[name] for cell in cells) for name in ("asked", "lost"))
    yield f"requests lost {played}", "requests", asked, lost, "requests of the clients"
    wrong = sum(cell["wrong"] for cell in cells)
    yield f"answers of a version that pin or time exclude {played}", "answers", asked, wrong, "requests of the clients"
    yield "cells that ended as they have to", "cells", len(cells), sum(cell["right"] for cell in cells), "cells played"
    yield f"the controller's memory, most {played}", "MB", 150.0, max(cell["memory_mb"] for cell in cells), MOST


def _at_rest(ground: Ground, models: int) -> Iterator[Row]:
    """Nothing is promoted: what a round takes, and what the process does."""
    stage = Stage(ground, [f"m{number}" for number in range(models)], served=replace(STAND_IN, patience_seconds=900))
    with stage.standing():
        for name in stage.names:
            stage.register(name, 1)
        for name in stage.names:
            stage.wait(name, lambda look: look.serves_alone("1"), "it does not serve")
        stage.stop_looking()
        time.sleep(5)
        process = stage.controller.process()
        before, busy = _rounds(stage), sum(process.cpu_times()[:2])
        time.sleep(REST_SECONDS)
        seconds, count = (now - then for now, then in zip(_rounds(stage), before, strict=True))
        share = (sum(process.cpu_times()[:2]) - busy) / REST_SECONDS
        memory = process.memory_info().rss / 1e6
    what = f"{models} models that serve" if models > 1 else "one model that serves"
    yield f"{what}: a round of the controller", "s", 3.0, seconds / count, MOST
    yield f"{what}: the controller's share of a core", "%", 1.0, 100 * share, MOST
    yield f"{what}: the controller's memory", "MB", 150.0, memory, MOST


def _rounds(stage: Stage) -> tuple[float, float]:
    """Seconds of all rounds so far, and their number."""
    found = dict(_SUM.findall(get(stage.controller.metrics) or ""))
    return float(found["sum"]), float(found["count"])
