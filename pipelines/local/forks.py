"""Runs the steps of a local run as forks of its worker, which imports the heavy libraries once for all of them.

KFP's local runner starts a new interpreter for each task, and importing torch, transformers and MLflow anew took
longer than the work of a small recipe. A forked step is a process of its own all the same: what it does to itself
ends with it.
"""

from __future__ import annotations

import atexit
import builtins
import gc
import multiprocessing
import os
import signal
import sys
import tempfile
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path

import psutil

from nvila.components.contracts.children import die_with_parent
from nvila.components.contracts.environment import take_over
from nvila.components.contracts.keys import library_versions
from nvila.components.runner.execute import ALWAYS
from nvila.components.runner.status import Status, statuses
from nvila.components.tracking.connect import load_client

_ALWAYS_NEEDED = (
    "nvila.components.contracts.recipe.recipe",
    "mlflow.store.tracking.sqlalchemy_store",
    "mlflow.store.model_registry.sqlalchemy_store",
)
"""Each step that works tells MLflow, and three steps always work."""
_FOR_WORK = (
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
_SHORT_SECONDS = 0.5
"""A step that is over by then is not kept waiting for an import."""
_SCRIPT = "ephemeral_component.py"
"""Where KFP's command puts the wrapper's source, which is the argument after the command."""


def run_steps_in_forks(run_dir: Path) -> None:
    """From now on KFP's local runner forks this process for each task of the run in `run_dir`."""
    from kfp.local import subprocess_task_handler

    load_client()
    for name in _ALWAYS_NEEDED:
        import_module(name)
    library_versions([])  # reads once for all steps which distribution brings which package
    steps = _Forks(run_dir)
    if not callable(subprocess_task_handler.run_local_subprocess):
        raise TypeError("KFP's local runner has changed: it runs no command by run_local_subprocess")
    subprocess_task_handler.run_local_subprocess = steps.run


class _Forks:
    """Runs one task after the other, and imports while they work."""

    def __init__(self, run_dir: Path) -> None:
        self._run_dir = run_dir
        self._wanted = list(_FOR_WORK)
        self._print = builtins.print

    def run(self, full_command: list[str], env_vars: Mapping[str, str] | None = None) -> int:
        """Run the command of a task to its end; return its exit code."""
        source, arguments = _wrapper(full_command)
        gc.freeze()  # the collector of a fork would write to, and so copy, every page that it looks at
        step = multiprocessing.get_context("fork").Process(
            target=self._step, args=(source, arguments, dict(env_vars or {}), os.getpid())
        )
        step.start()
        step.join(_SHORT_SECONDS)
        while self._wanted and self._has_work() and step.is_alive():
            import_module(self._wanted.pop(0))
        step.join()
        return step.exitcode or 0

    def _has_work(self) -> bool:
        """Whether a step was not skipped: then those that follow it will not be either."""
        steps = statuses(self._run_dir)
        return any(step.status is Status.DONE and step.name not in ALWAYS for step in steps)

    def _step(self, source: str, arguments: list[str], environment: dict[str, str], parent: int) -> None:
        """In the fork: what KFP's command would do in a new interpreter."""
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        die_with_parent(parent)
        atexit._clear()  # what was registered before the fork is the parent's to clean up
        builtins.print = self._print  # without KFP's indentation, which it would also write before lines for stderr
        take_over({"_KFP_RUNTIME": "true"} | environment)
        _forget_changed_code(psutil.Process(parent).create_time())
        from kfp.dsl.executor_main import executor_main

        try:
            with tempfile.TemporaryDirectory() as folder:
                script = Path(folder, _SCRIPT)
                script.write_text(source, encoding="utf-8")
                sys.argv = ["kfp.dsl.executor_main", "--component_module_path", str(script), *arguments]
                executor_main()
        finally:
            atexit._run_exitfuncs()


def _forget_changed_code(since: float) -> None:
    """Have our own modules imported anew where one was edited after `since`: a key is made of the files on disk."""
    ours = {name: module for name, module in sys.modules.items() if name.startswith("nvila.")}
    files = [Path(file) for module in ours.values() if (file := getattr(module, "__file__", None))]
    if any(not file.exists() or file.stat().st_mtime > since for file in files):
        for name in ours:
            del sys.modules[name]


def _wrapper(command: list[str]) -> tuple[str, list[str]]:
    """Source of the KFP wrapper and the arguments of KFP's executor, out of a container's command."""
    for index, part in enumerate(command):
        if _SCRIPT in part:
            return command[index + 1], command[index + 2 :]
    raise ValueError(f"not the command of a Python component: {command[:2]}")
