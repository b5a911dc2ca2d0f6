"""Saves the state of an unfinished stage while training goes on, and brings it back.

A checkpoint is written by all processes (`writer`), agreed upon at a step that they reach together, and then named
(`checkpoints`) by the first. All methods but the constructor are called by every process together.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from nvila.components.contracts.errors import NvilaError, TrainingError
from nvila.components.contracts.files import read_json, sync_tree, write_atomic
from nvila.components.contracts.manifest import File, describe_files
from nvila.components.contracts.recipe.train import Run
from nvila.components.contracts.sealed import write_record
from nvila.components.train.checkpoints import (
    ABOUT,
    RECORD,
    bring_back,
    clear,
    newest_sound,
    outlook,
    partial,
    plainly_named,
    publish,
)
from nvila.components.train.engine import Engine
from nvila.components.train.universal import fitting
from nvila.components.train.writer import Writer

T = TypeVar("T")


class Keeper:
    """The checkpoints of a stage in a folder, with a copy of its logs in each."""

    def __init__(self, engine: Engine, folder: Path, logs: Sequence[Path], run: Run, base: str = "") -> None:
        """`logs` are what they were at a checkpoint after a resume: what they say is as sound as its weights. `base` is
        the digest of the model that the stage began with: a checkpoint has what is trained of it, and no more."""
        self._engine, self._folder, self._logs, self._run, self._base = engine, folder, logs, run, base
        self._writer = Writer()
        self._step: int | None = None
        self._written: Future[dict[str, File]] | None = None
        self._named: Future[None] | None = None

    def resume(self) -> int:
        """Load the newest sound checkpoint and return its step, or 0 where there is none; the logs are then as it has
        them, or empty."""
        engine = self._engine
        # As rank 0 sees it: another machine's view of a shared file system may be older.
        name = newest_sound(self._folder) if engine.rank == 0 else None
        if engine.rank == 0:
            bring_back(self._folder / name if name else None, self._logs)
        name = engine.gather([name])[0]
        if name is None:
            return 0
        self._same_base(self._folder / name)
        with (
            fitting(engine, self._folder / name, self._run.zero) as checkpoint,
            plainly_named(checkpoint.parent) as place,
        ):
            _, state = engine.deepspeed.load_checkpoint(place, tag=checkpoint.name, load_module_strict=False)
        return int(state["step"])

    def save(self, step: int, loss: float | None) -> None:
        """Begin to write a checkpoint; one that is still being written is waited for.

        Args:
            step: how many steps it is behind.
            loss: mean over the supervised tokens since the checkpoint before.
        """
        self.settle()
        engine, at = self._engine, self._folder / partial(step)
        engine.deepspeed.checkpoint_engine.save = self._take
        engine.deepspeed.save_checkpoint(
            str(self._folder),
            tag=at.name,
            client_state={"step": step},
            save_latest=False,
            exclude_frozen_parameters=True,
        )
        if engine.rank == 0:
            for log in self._logs:
                shutil.copyfile(log, at / log.name)
            about = {"step": step, "world": engine.world, "zero": self._run.zero, "loss": loss, "base": self._base}
            write_atomic(at / ABOUT, json.dumps(about) + "\n")
        self._step, self._written = step, self._writer.begin()

    def _take(self, state_dict: Any, path: str) -> None:
        """Hand on what DeepSpeed saves, without what it overlooks of the frozen weights: a tied output layer."""
        if isinstance(module := state_dict.get("module"), dict):
            named = self._engine.deepspeed.module.named_parameters(remove_duplicate=False)
            frozen = {name for name, parameter in named if not parameter.requires_grad}
            state_dict = {**state_dict, "module": {name: one for name, one in module.items() if name not in frozen}}
        self._writer.take(state_dict, path)

    def _same_base(self, checkpoint: Path) -> None:
        """Raises:
        TrainingError: it is of a stage that began with another model.
        """
        base = read_json(checkpoint / ABOUT).get("base", "") if self._engine.rank == 0 else self._base
        if base != self._base:
            raise TrainingError(
                "the checkpoint is of a stage that began with another model",
                where=str(checkpoint),
                value=base,
                do="Remove the folder: the stage then begins anew",
            )

    def before_update(self) -> None:
        """Wait until weights and moments may change."""
        with self._said():
            self._writer.wait_until_copied()

    @property
    def writing(self) -> bool:
        """Whether this process has yet to write some of the checkpoint.

        Raises:
            NvilaError: it could not.
        """
        if self._named and self._named.done():
            self._result(self._named)
        if self._written and self._written.done():
            self._result(self._written)
        return bool(self._written and not self._written.done())

    def publish(self) -> None:
        """Now that every process has written its part: have the first name the checkpoint; nobody waits for it."""
        if self._written is None or self._step is None:
            return
        files = dict(self._engine.gather(list(self._result(self._written).items())))
        if self._engine.rank == 0:
            thread = ThreadPoolExecutor(1, "publish")
            self._named = thread.submit(self._publish, self._step, files)
            thread.shutdown(wait=False)
        self._written = None

    def settle(self) -> None:
        """Wait until what was saved has its name."""
        if self._step is None:
            return
        self.publish()
        if self._named:
            self._result(self._named)
        self._step = self._named = None
        self._engine.total(0)  # nobody goes on, or ends, before it has its name

    def _publish(self, step: int, files: dict[str, File]) -> None:
        at = self._folder / partial(step)
        sync_tree(at)
        small = [path.name for path in sorted(at.iterdir()) if path.is_file() and path.name not in files]
        write_record(at / RECORD, files | describe_files(at, small))
        publish(self._folder, step, self._run.keep_checkpoints, self._run.keep_best)

    def _result(self, future: Future[T]) -> T:
        with self._said():
            return future.result()

    @contextmanager
    def _said(self) -> Iterator[None]:
        """A thread's error as the loop's, with what was half written removed."""
        try:
            yield
        except OSError as error:
            clear(self._folder)
            raise NvilaError(
                f"the checkpoint of step {self._step} could not be written: {error.strerror or error}",
                where=error.filename or str(self._folder),
                do=f"{_room(self._folder)}. {outlook(self._folder)}",
            ) from error


def _room(folder: Path) -> str:
    try:
        return f"The disk has {shutil.disk_usage(folder).free >> 20} MiB left"
    except OSError as error:
        return f"The folder is away ({error.strerror})"
