"""The child process of `nvila run`: runs the DAG with KFP's local runner.

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
from nvila.components.contracts.exits import Exit
from nvila.components.tracking.redact import tell

ARGUMENTS = "arguments.json"
"""In the run's folder: the pipeline's arguments."""
GRACE_SECONDS = 60.0
"""How long a step may take to save its progress when it is asked to stop."""


def main(run_dir: Path, python: Path) -> int:
    """Run the steps with the `python3` in the folder `python`, which is the first on the PATH.

    Returns:
        Exit code: 0, or 1 (the steps' status files say why).
    """
    from nvila.pipelines.local import forks

    steps = forks.start(python, run_dir)  # it imports while KFP is imported here
    from kfp import local

    from nvila.components.contracts.environment import Environment
    from nvila.components.contracts.pipelines import PIPELINES
    from nvila.pipelines.build import build

    arguments = json.loads((run_dir / ARGUMENTS).read_text(encoding="utf-8"))
    local.init(
        runner=local.SubprocessRunner(use_venv=False),
        pipeline_root=str(run_dir / "kfp"),
        workspace_root=str(run_dir / "workspace"),
    )
    # KFP puts this in the place of each `python3` in a command and in its arguments, which so stay as they are.
    sys.executable = "python3"
    try:
        build(pipeline=PIPELINES[Environment.read().pipeline or "lifecycle"])(**arguments)
    except RuntimeError as error:  # KFP's way to say that a task failed
        print(tell(str(error)), flush=True)
        return 1
    finally:
        steps.terminate()
        steps.wait()
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
    raise SystemExit(main(Path(sys.argv[1]), Path(sys.argv[3])))
