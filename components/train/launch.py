"""Starts the training processes on this machine under torchrun's agent, waits, and hands on a request to stop."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path
from typing import TYPE_CHECKING

from nvila.components.contracts.errors import NvilaError, Preempted, TrainingError
from nvila.components.contracts.exits import Exit
from nvila.components.contracts.manifest import write_atomic
from nvila.components.train.job import VERDICT, Job
from nvila.components.train.worker import main

if TYPE_CHECKING:
    from torch.distributed.launcher.api import LaunchConfig


def launch(job: Job) -> None:
    """Run the job to its end.

    The agent is this process. It passes a signal on to the training processes; if it is killed, they are told.

    Raises:
        Preempted: a stop was asked for (SIGTERM, Ctrl-C); the checkpoint is written.
        NvilaError: what the first worker reported.
        TrainingError: a worker died without a word (killed for memory, say).
    """
    from torch.distributed import TCPStore
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import elastic_launch

    out = Path(job.out)
    write_atomic(out / "job.json", job.model_dump_json(indent=1))
    (out / VERDICT).unlink(missing_ok=True)
    os.environ["DS_LOG_LEVEL"] = "warning"
    logs = out / "torchrun"
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
    before = {number: signal.getsignal(number) for number in numbers}  # the agent puts its own in their place
    # Takes a free port, which the agent shares. With the rendezvous of `--standalone` it would inspect its whole call
    # stack at each move, and that takes seconds where thousands of modules are loaded.
    meeting = TCPStore("localhost", 0, is_master=True, wait_for_workers=False, multi_tenant=True)
    try:
        elastic_launch(_torchrun(job.run.gpus, meeting.port, logs), main)(str(out / "job.json"))
    except SignalException:
        raise Preempted(
            f"stage {job.stage.name} was asked to stop; run again and it resumes at its last checkpoint"
        ) from None
    except ChildFailedError as failed:
        _, first = failed.get_first_failure()
        raise _reported(out / VERDICT) or TrainingError(
            f"stage {job.stage.name}: a training process ended with code {first.exitcode} and no message",
            where=str(out),
            do="Look above in the log; code -9 is usually the kernel out of memory. Run again and it resumes.",
        ) from None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        shutil.rmtree(logs, ignore_errors=True)


def _torchrun(processes: int, port: int, logs: Path) -> LaunchConfig:
    """What torchrun's own command line makes of these options; the agent needs no interpreter of its own then."""
    from torch.distributed.run import config_from_args, parse_args

    from nvila.components.model.device import start_method

    options = {
        "nproc-per-node": processes,
        "rdzv-backend": "static",
        "rdzv-endpoint": f"localhost:{port}",
        "start-method": start_method(),
        "log-dir": logs,
    }
    config, _, _ = config_from_args(parse_args([*(f"--{name}={value}" for name, value in options.items()), "worker"]))
    return config


def _reported(path: Path) -> NvilaError | None:
    if not path.exists():
        return None
    record = json.loads(path.read_text())
    kinds = {kind.__name__: kind for kind in NvilaError.__subclasses__()}
    error = kinds.get(record["error"], TrainingError)(record["message"])
    error.exit_code = Exit(record["exit_code"])  # type: ignore[misc]
    return error
