"""The child process of `nvila run`: builds demonstration data, then runs the DAG with KFP's local runner.

A process of its own so that KFP's chatter goes to the run's log while the parent draws the terminal, and so that one
signal to its process group reaches every step.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import NoReturn

from nvila.components.contracts.children import die_with_parent
from nvila.components.contracts.errors import NvilaError
from nvila.components.contracts.exits import Exit
from nvila.components.contracts.progress import progress_to

ARGUMENTS = "arguments.json"
"""In the run's folder: the pipeline's arguments and the demonstration sources to build."""
GRACE_SECONDS = 60.0
"""How long a step may take to save its progress when it is asked to stop."""


def main(run_dir: Path) -> int:
    """Exit code: 0, that of `NvilaError` when the data cannot be built, or 1 (the steps' status files say why)."""
    work = json.loads((run_dir / ARGUMENTS).read_text(encoding="utf-8"))
    try:
        _build_data(work["demo_sources"], run_dir)
    except NvilaError as error:
        print(error, file=sys.stderr, flush=True)
        return int(error.exit_code)
    return _run_pipeline(work["arguments"], run_dir)


def _build_data(sources: list[dict[str, object]], run_dir: Path) -> None:
    if not sources:
        return
    from nvila.components.contracts.recipe.data import Source
    from nvila.components.data.demo import ensure

    with progress_to(run_dir / "progress" / "data.json"):
        for source in sources:
            ensure(Source.model_validate(source))


def _run_pipeline(arguments: dict[str, object], run_dir: Path) -> int:
    from kfp import local

    from nvila.pipelines.lifecycle import build

    local.init(
        runner=local.SubprocessRunner(use_venv=False),
        pipeline_root=str(run_dir / "kfp"),
        workspace_root=str(run_dir / "workspace"),
    )
    try:
        build()(**arguments)
    except RuntimeError as error:  # KFP's way to say that a task failed
        print(error, flush=True)
        return 1
    return 0


def _stop_cleanly(parent: int) -> None:
    """On SIGTERM every step gets it once, may save its progress, and nothing of the run stays behind.

    The same happens when `nvila run` is killed outright.
    """
    signal.signal(signal.SIGTERM, _stop)
    die_with_parent(parent)


def _stop(signum: int, frame: object) -> NoReturn:
    import psutil

    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    children = psutil.Process().children(recursive=True)
    os.killpg(os.getpgrp(), signal.SIGTERM)
    # KFP would go on with the next branch of the DAG once the step has ended: leave from here.
    _, alive = psutil.wait_procs(children, timeout=GRACE_SECONDS)
    for process in alive:
        process.kill()
    os._exit(Exit.PREEMPTED)


if __name__ == "__main__":
    _stop_cleanly(parent=int(sys.argv[2]))
    raise SystemExit(main(Path(sys.argv[1])))
