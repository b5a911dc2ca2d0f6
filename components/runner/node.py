"""One node of a job that does a step's work: `python -m nvila.components.runner.node JOB.json`.

The first node runs the step and leaves its outcome; the others join in where the step has something for them. Ends with
the exit codes of `Exit`, which the job's failure policies act on.
"""

from __future__ import annotations

import importlib
import signal
import sys
import traceback
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

from nvila.components.contracts.environment import Environment, entered, handed_down
from nvila.components.contracts.errors import NvilaError, Preempted, PreflightError
from nvila.components.contracts.exits import Exit
from nvila.components.contracts.progress import progress_file
from nvila.components.contracts.step import call
from nvila.components.runner.code import code_digest
from nvila.components.runner.handover import Assignment, clear_verdict, write_outcome, write_verdict
from nvila.components.runner.work import machine
from nvila.components.tracking.redact import tell


def main(path: Path) -> Exit:
    """Do this node's part of the assignment and return the exit code."""
    signal.signal(signal.SIGTERM, _stop)
    here = Environment.read()
    node, folder = here.node, path.parent
    clear_verdict(folder, node)
    try:
        with entered(here):
            _work(Assignment.model_validate_json(path.read_bytes()), here, folder)
        return Exit.DONE
    except NvilaError as error:
        return _end(folder, node, error)
    except KeyboardInterrupt:
        return _end(folder, node, Preempted("interrupted"))
    except Exception as error:
        print(tell(traceback.format_exc()), file=sys.stderr, flush=True)
        return _end(folder, node, NvilaError(f"{type(error).__name__}: {error}"))


def _work(assignment: Assignment, here: Environment, folder: Path) -> None:
    if (ours := code_digest()) != assignment.code:
        raise PreflightError(
            "the image of the job holds other code than the image of the step",
            where=assignment.step,
            value={"step": assignment.code, "job": ours},
            do="Build both images from one commit, and set the training runtime's image to match the pipeline's.",
        )
    code: Any = importlib.import_module(assignment.module)
    settings = code.Settings.model_validate(assignment.settings)
    if here.node == 0:
        with handed_down(progress_file=progress_file(assignment.run_dir, assignment.step)):
            outcome = call(code.run, settings, assignment.inputs, assignment.out, here=here)
            write_outcome(folder, replace(outcome, machine=machine(here.threads)))
    elif hasattr(code, "join"):
        code.join(settings, assignment.inputs, assignment.out)


def _end(folder: Path, node: int, error: NvilaError) -> Exit:
    write_verdict(folder, node, error)
    print(tell(f"node {node}: {error}"), file=sys.stderr, flush=True)
    return Exit(error.exit_code)


def _stop(signum: int, frame: object) -> NoReturn:
    raise Preempted("the job was asked to stop", do="Run the same command again to resume.")


if __name__ == "__main__":
    raise SystemExit(int(main(Path(sys.argv[1]))))
