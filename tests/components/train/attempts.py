"""Attempts at a stage in processes of their own, which may be killed; forked, so that an attempt costs no imports."""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable

from nvila.components.serve.ports import free_port
from nvila.components.train.job import Job
from nvila.components.train.loop import StopRequest, leave, train


class Attempt:
    """Training processes, one per rank; `before` is called in each of them."""

    def __init__(self, job: Job, before: Callable[[], object] = lambda: None, stop: StopRequest | None = None) -> None:
        port = free_port("127.0.0.1")
        self.pids = [self._fork(job, before, stop, rank, port) for rank in range(job.run.gpus)]

    def wait(self) -> list[int]:
        """Exit codes by rank: 0 done, 75 stopped, -9 killed."""
        return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in self.pids]

    def _fork(self, job: Job, before: Callable[[], object], stop: StopRequest | None, rank: int, port: int) -> int:
        if pid := os.fork():
            return pid
        code = 1
        try:
            place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": job.run.gpus, "MASTER_PORT": port}
            os.environ |= {name: str(value) for name, value in place.items()}
            before()
            train(job, stop or StopRequest())
            leave()
            code = 0
        except BaseException as error:
            code = int(getattr(error, "exit_code", 1))
            if code != 75:
                traceback.print_exc()
        finally:
            os._exit(code)
