"""Starts this machine's training processes under torchrun's agent, waits, and hands on a request to stop.

On a cluster every node of the job does so; who they are stands in the variables that Kubeflow Trainer sets (`PET_...`).
"""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nvila.components.contracts.children import die_with_parent, forking, how_ended
from nvila.components.contracts.environment import current
from nvila.components.contracts.errors import ConfigError, Preempted, TrainingError
from nvila.components.contracts.manifest import write_atomic
from nvila.components.train import verdict
from nvila.components.train.checkpoints import outlook
from nvila.components.train.job import Job
from nvila.components.train.loop import CHECKPOINTS, main
from nvila.components.train.meeting import meet

if TYPE_CHECKING:
    from torch.distributed.launcher.api import LaunchConfig

SAVE_SECONDS = 270
"""How long processes that were asked to stop may take for the step under way and the checkpoint; torchrun's own 30 s
are too short for large ones. A pod of a training job has 300 s in all."""


def launch(job: Job) -> None:
    """Run this node's share of the job to its end; a job on one machine has one node.

    The agent is this process. It passes a signal on to the training processes; if it is killed, so are they.

    Raises:
        ConfigError: the nodes cannot share the processes evenly.
        Preempted: a stop was asked for (SIGTERM, Ctrl-C); the checkpoint is written.
        NvilaError: what the first worker reported.
        TrainingError: a worker died without a word (killed for memory, say).
    """
    from torch.distributed import TCPStore
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import elastic_launch

    out, here = Path(job.out), current()
    node, nodes = here.node, here.nodes
    description = out / (f"job-{node}.json" if node else "job.json")
    write_atomic(description, job.model_dump_json(indent=1))
    if node == 0:
        (out / verdict.VERDICT).unlink(missing_ok=True)
    stale = verdict.stamp(out)
    logs = out / f"torchrun-{node}"
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
    before = {number: signal.getsignal(number) for number in numbers}  # the agent puts its own in their place
    if nodes == 1:
        # Takes a free port, which the agent shares. With the rendezvous of `--standalone` it would inspect its whole
        # call stack at each move, and that takes seconds where thousands of modules are loaded.
        meeting = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, multi_tenant=True)
        endpoint = f"127.0.0.1:{meeting.port}"
    else:
        meeting = meet(here.master_address, here.master_port, nodes, node)
        endpoint = f"{here.master_address}:{here.master_port}"
    there = {"nnodes": nodes, "node-rank": node, "rdzv-endpoint": endpoint}
    try:
        with forking():
            elastic_launch(_torchrun(job.run.gpus, there, logs), _rank)(os.getpid(), str(description))
    except SignalException:
        raise Preempted(
            f"stage {job.stage.name} was asked to stop; run again and it resumes at its last checkpoint"
        ) from None
    except ChildFailedError as failed:
        _, first = failed.get_first_failure()
        # Of one that was killed the others say only that they have lost it.
        told = None if first.exitcode == -signal.SIGKILL else verdict.read(out, stale)
        error = told or TrainingError(
            f"stage {job.stage.name}: a training process {how_ended(first.exitcode)}, and left no message",
            where=str(out),
            do=f"Look above in the log. {outlook(out / CHECKPOINTS)}",
        )
        if nodes > 1:  # processes of other nodes wait for those of this one
            verdict.give(out, error, stale)
        raise error from None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        shutil.rmtree(logs, ignore_errors=True)


def _rank(agent: int, description: str) -> None:
    """A training process. One that was told of its agent's end, as torch would have it, might wait for a peer for half
    an hour, and write meanwhile into the folder where the next attempt works."""
    die_with_parent(agent, signal.SIGKILL)
    main(description)


def _torchrun(processes: int, there: Mapping[str, Any], logs: Path) -> LaunchConfig:
    """What torchrun's own command line makes of these options; the agent needs no interpreter of its own then.

    Nodes are numbered as they are, so that rank 0 and its log are on the first.
    """
    from torch.distributed.run import config_from_args, parse_args

    from nvila.components.model.device import start_method

    if processes % there["nnodes"]:
        raise ConfigError(f"{there['nnodes']} nodes cannot share {processes} processes evenly", where="train.gpus")
    options = {
        "nproc-per-node": processes // there["nnodes"],
        "rdzv-backend": "static",
        "start-method": start_method(),
        "log-dir": logs,
        "shutdown-timeout": SAVE_SECONDS,
        **there,
    }
    config, _, _ = config_from_args(parse_args([*(f"--{name}={value}" for name, value in options.items()), "worker"]))
    return config
