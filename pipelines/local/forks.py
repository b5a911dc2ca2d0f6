"""Runs the steps of a local run as forks of one process, which imports the heavy libraries once for all of them.

KFP's local runner starts a new interpreter for each task, and importing torch, transformers and MLflow anew took
longer than the work of a small recipe. The `python3` that it finds on its path is a client (`fork_client`): it hands
its arguments and environment to the process here, which runs nothing of KFP's and has no state but what was imported,
and ends as the fork does. A forked step is a process of its own all the same: what it does to itself ends with it.
"""

from __future__ import annotations

import atexit
import gc
import json
import os
import runpy
import shlex
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Iterable, Sequence
from contextlib import suppress
from importlib import import_module
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, NoReturn

from nvila.components.contracts.children import die_with_parent, killed_by
from nvila.components.contracts.environment import for_child, take_over
from nvila.components.contracts.keys import library_versions
from nvila.components.contracts.surroundings import settle
from nvila.components.runner.execute import ALWAYS
from nvila.components.runner.status import Status, note_killed, statuses
from nvila.components.tracking.connect import load_client
from nvila.pipelines.local import fork_client
from nvila.pipelines.local.fork_client import address

ALWAYS_NEEDED = (
    "kfp.dsl.executor",
    "nvila.components.contracts.recipe.recipe",
    "mlflow.store.tracking.sqlalchemy_store",
    "mlflow.store.model_registry.sqlalchemy_store",
)
"""Each step that works tells MLflow, and three steps always work."""
FOR_WORK = (
    "torch",
    "sklearn.metrics",
    "torch._dynamo",
    "transformers.models.qwen2.modeling_qwen2",
    "transformers.models.qwen2.tokenization_qwen2",
    "transformers.models.siglip.modeling_siglip",
    "matplotlib.figure",
    "torch.distributed.launcher.api",
    "pyarrow.parquet",
)
"""In the order in which the steps of a new run come to need them; what transformers imports comes apart before it,
since a step that is next waits for the import under way. None may ask CUDA for anything: a fork could not use it."""
SHORT_SECONDS = 0.5
"""A step that is over by then is not kept waiting for an import."""


def put_client(folder: Path) -> None:
    """Write the `python3` that KFP's local runner is to find: `folder` comes first on its PATH."""
    words = [sys.executable, "-IS", fork_client.__file__, str(folder)]
    script = folder / "python3"
    script.write_text(f'#!/bin/sh\nexec {shlex.join(words)} "$@"\n')
    script.chmod(0o700)


def start(folder: Path, run_dir: Path, program: Sequence[str] = ("-m", __name__)) -> subprocess.Popen[bytes]:
    """Start the process that forks, for the client in `folder` and the run in `run_dir`; it ends with this one.

    `program` is what calls `main`.
    """
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(address(str(folder)))
        listener.listen()
        return subprocess.Popen(
            [sys.executable, *program, str(listener.fileno()), str(run_dir), str(os.getpid())],
            pass_fds=[listener.fileno()],
            env=for_child({"_KFP_RUNTIME": "true"}),  # of KFP, only what its tasks import
        )


def main(arguments: list[str]) -> None:
    """Fork until a stop is asked for, or the parent is gone; a fork is told apart by having a task.

    `arguments` are the listening descriptor, the run's folder, and the parent's process id.
    """
    settle()  # before what is imported for all forks
    descriptor, run_dir, parent = arguments
    leave = _Leave()
    forks = _Forks(socket.socket(fileno=int(descriptor)), Path(run_dir), int(parent))
    load_client()
    for name in ALWAYS_NEEDED:
        import_module(name)
    library_versions([])  # reads once for all steps which distribution brings which package
    if task := forks.serve(FOR_WORK):
        leave.code = _run(task)


class _Forks:
    """Forks for one task after the other, or several at once, and imports while they work."""

    def __init__(self, listener: socket.socket, run_dir: Path, parent: int) -> None:
        self._listener, self._run_dir, self._parent = listener, run_dir, parent
        self._steps: dict[int, tuple[int, socket.socket]] = {}
        """Process and client of each step under way, by a descriptor that is ready when the process has ended."""
        self._stopping = False
        self._began = time.time()
        self._written: dict[Path, int] = {}
        """When each of our files was last written, as first seen: a clock that was set back says nothing of before."""
        self._woken, waker = socket.socketpair()  # a signal interrupts no wait: this does
        waker.setblocking(False)
        self._waker = waker
        signal.set_wakeup_fd(waker.fileno())
        signal.signal(signal.SIGTERM, self._stop)
        die_with_parent(parent)

    def serve(self, imports: Iterable[str]) -> dict[str, Any] | None:
        """In a fork, the task that it is for; None when there is nothing more to fork."""
        wanted: list[str] = list(imports)
        pause: float | None = None
        while self._steps or not self._stopping:
            ready = wait([self._listener, self._woken, *self._steps], pause)
            if not ready:
                pause = self._import(wanted)
            if self._woken in ready:
                self._woken.recv(64)
            for ended in self._steps.keys() & set(ready):
                self._answer(ended)
            if self._listener in ready:
                if task := self._accept():
                    return task
                pause = SHORT_SECONDS
            if not (wanted and self._steps):
                pause = None
        return None

    def _import(self, wanted: list[str]) -> float | None:
        """Import the next module if it is needed; how long to wait before the one after it."""
        if not self._has_work():
            return None
        import_module(wanted.pop(0))
        self._is_old()
        return 0.0

    def _accept(self) -> dict[str, Any] | None:
        """Fork for the task of a client; in the fork, return it. One that our imports are too old for gets an
        interpreter of its own."""
        client, _ = self._listener.accept()
        with client.makefile("rb") as sent:
            task = json.load(sent)
        old = self._is_old()
        gc.freeze()  # the collector of a fork would write to, and so copy, every page that it looks at
        server, process = os.getpid(), os.fork()
        if process:
            self._steps[os.pidfd_open(process)] = process, client
            return None
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        die_with_parent(server)
        for end in (self._listener, self._woken, self._waker, client, *(other for _, other in self._steps.values())):
            end.close()
        for ended in self._steps:
            os.close(ended)
        if old:
            os.execve(sys.executable, [sys.executable, *task["arguments"]], task["environment"])
        return dict(task)

    def _answer(self, ended: int) -> None:
        process, client = self._steps.pop(ended)
        os.close(ended)
        code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
        if code < 0:
            note_killed(self._run_dir, process, killed_by(-code))
        with client, suppress(OSError):  # a client that was stopped has its answer
            client.sendall(str(code).encode())

    def _has_work(self) -> bool:
        """Whether a step was not skipped: then those that follow it will not be either."""
        steps = statuses(self._run_dir)
        return any(step.status is Status.DONE and step.name not in ALWAYS for step in steps)

    def _is_old(self) -> bool:
        """Whether one of our files was edited since it was imported: a key is made of the files on disk."""
        ours = [module for name, module in list(sys.modules.items()) if name.startswith("nvila.")]
        files = [Path(file) for module in ours if (file := getattr(module, "__file__", None))]
        return not all(map(self._is_as_it_was, files))

    def _is_as_it_was(self, file: Path) -> bool:
        try:
            written = file.stat()
        except FileNotFoundError:
            return False
        first = self._written.setdefault(file, written.st_mtime_ns)
        return first == written.st_mtime_ns and written.st_mtime <= self._began

    def _stop(self, signum: int, frame: object) -> None:
        """The group was told to stop, and with it each step: wait for them. Without a parent, end them by ending."""
        if os.getppid() != self._parent:
            os._exit(1)
        self._stopping = True


def _run(task: dict[str, Any]) -> int:
    """In the fork: what a new interpreter would do with these arguments and this environment."""
    take_over(task["environment"])
    _, module, *arguments = task["arguments"]  # of python3 -m
    sys.argv = [module, *arguments]
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as left:
        if isinstance(left.code, str):
            print(left.code, file=sys.stderr)
        return left.code if isinstance(left.code, int) else int(left.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


class _Leave:
    """Ends the process when all is done that others have registered for its end: registered first, it comes last.

    Taking down what was imported would take longer than many a step.
    """

    def __init__(self) -> None:
        self.code = 0
        atexit.register(self._leave)

    def _leave(self) -> NoReturn:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(self.code)


if __name__ == "__main__":
    main(sys.argv[1:])
