"""Starts the training processes on this machine with torchrun, waits, and hands on a request to stop."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import FrameType

from nvila.components.contracts.children import die_with_parent
from nvila.components.contracts.errors import NvilaError, Preempted, TrainingError
from nvila.components.contracts.exits import Exit
from nvila.components.contracts.manifest import write_atomic
from nvila.components.train.job import VERDICT, Job


def launch(job: Job) -> None:
    """Run the job to its end.

    Raises:
        Preempted: a stop was asked for (SIGTERM, Ctrl-C); the checkpoint is written.
        NvilaError: what the first worker reported.
        TrainingError: a worker died without a word (killed for memory, say).
    """
    out = Path(job.out)
    write_atomic(out / "job.json", job.model_dump_json(indent=1))
    (out / VERDICT).unlink(missing_ok=True)
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={job.run.gpus}"),
        *("-m", "nvila.components.train.worker", str(out / "job.json")),
    ]
    environment = os.environ | {"TORCHELASTIC_ERROR_FILE": "", "DS_LOG_LEVEL": "warning"}
    bound = partial(die_with_parent, os.getpid())
    process = subprocess.Popen(command, env=environment, start_new_session=True, preexec_fn=bound)
    asked = False

    def stop(signum: int, frame: FrameType | None) -> None:
        nonlocal asked
        asked = True
        process.send_signal(signal.SIGTERM)

    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        code = process.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    if code == 0:
        return
    if asked:
        raise Preempted(f"stage {job.stage.name} was asked to stop; run again and it resumes at its last checkpoint")
    raise _reported(out / VERDICT) or TrainingError(
        f"stage {job.stage.name}: a training process ended with code {code} and no message",
        where=str(out),
        do="Look above in the log; code -9 is usually the kernel out of memory. Run again and it resumes.",
    )


def _reported(path: Path) -> NvilaError | None:
    if not path.exists():
        return None
    record = json.loads(path.read_text())
    kinds = {kind.__name__: kind for kind in NvilaError.__subclasses__()}
    error = kinds.get(record["error"], TrainingError)(record["message"])
    error.exit_code = Exit(record["exit_code"])  # type: ignore[misc]
    return error
