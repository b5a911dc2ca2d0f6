"""A step's own process as far as the launcher sees it: `python launcher.py WORK.json` prints what the job has made."""

from __future__ import annotations

import json
import signal
import sys
from pathlib import Path
from typing import Any, NoReturn

from nvila.components.contracts.environment import Environment, handed_down
from nvila.components.contracts.errors import NvilaError, Preempted
from nvila.components.contracts.progress import progress_file
from nvila.components.runner.work import Work
from nvila.infra.launch import follow
from nvila.infra.launch import launcher as site


def work_from(record: dict[str, Any]) -> Work:
    """The work that a test has written down."""
    places = {"out": Path(record["out"]), "run_dir": Path(record["run_dir"])}
    return Work(**{**record, **places}, here=Environment.read())


def _stop(signum: int, frame: object) -> NoReturn:
    raise Preempted("asked to stop")


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, _stop)
    follow.LOOK_SECONDS = 2.0
    site.OUTCOME_SECONDS = site.VERDICT_SECONDS = 1.0  # this disk shows files at once
    work = work_from(json.loads(Path(sys.argv[1]).read_text()))
    try:
        with handed_down(progress_file=progress_file(work.run_dir, work.step)):
            print("made", json.dumps(site.run(work).result.model_dump()), flush=True)
    except NvilaError as error:
        print(f"{type(error).__name__}: {error}", flush=True)
        sys.exit(int(error.exit_code))
