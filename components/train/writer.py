"""Writes the files of a checkpoint while training goes on: one thread copies the tensors, then writes and hashes them.

Tensors must not change before they are copied: whoever changes them waits for that, and for nothing else.
"""

from __future__ import annotations

import copy
import os
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from hashlib import sha256
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, cast

from nvila.components.contracts.files import sync
from nvila.components.contracts.manifest import File

if TYPE_CHECKING:
    import torch

WRITING_NICENESS = 10
"""Of the thread once the tensors are copied: hashing must not take a core from training."""


class Writer:
    """Takes what DeepSpeed would save, and writes it later. At most one checkpoint is in the air."""

    def __init__(self) -> None:
        self._taken: dict[Path, Any] = {}
        self._copied: Future[dict[Path, Any]] | None = None

    def take(self, state_dict: Any, path: str) -> None:
        """In the place of DeepSpeed's `checkpoint_engine.save`: hold on to the state, its tensors not yet copied."""
        self._taken[Path(path).resolve()] = _mapped(state_dict, lambda tensor: tensor.detach())

    def begin(self) -> Future[dict[str, File]]:
        """Copy, write, hash and sync what was taken; the result says which files these are, by name."""
        thread = ThreadPoolExecutor(1, "checkpoint")
        taken, self._taken = self._taken, {}
        self._copied = thread.submit(_copies, taken, _ready())
        written = thread.submit(_write, self._copied)
        thread.shutdown(wait=False)
        return written

    def wait_until_copied(self) -> None:
        """Return when the tensors may change; an error of the copying is raised here."""
        if self._copied is not None:
            self._copied.result()
            self._copied = None


def _mapped(value: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """A copy of a nested state whose tensors are replaced."""
    import torch

    if isinstance(value, torch.Tensor):
        return change(value)
    if isinstance(value, dict):
        fresh = copy.copy(value)  # with what a module's state dictionary has besides its items
        for key, item in value.items():
            fresh[key] = _mapped(item, change)
        return fresh
    if type(value) in (list, tuple):
        return type(value)(_mapped(item, change) for item in value)
    return copy.deepcopy(value)


def _ready() -> torch.cuda.Event | None:
    """When the GPU has done what was asked of it until now."""
    import torch

    if not torch.cuda.is_available():
        return None
    event = torch.cuda.Event()
    event.record()
    return event


def _copies(taken: dict[Path, Any], ready: torch.cuda.Event | None) -> dict[Path, Any]:
    """The states with their tensors in memory of their own; a GPU's are copied beside its other work."""
    import torch

    stream = torch.cuda.Stream(ready.device) if ready else None
    copied: dict[tuple[Any, ...], torch.Tensor] = {}

    def to_host(tensor: torch.Tensor) -> torch.Tensor:
        whose = (tensor.device, tensor.dtype, tensor.data_ptr(), tensor.shape, tensor.stride())
        if tensor.numel() == 0 or whose not in copied:  # tied weights stay one
            copied[whose] = torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda)
            copied[whose].copy_(tensor, non_blocking=tensor.is_cuda)
        return copied[whose]

    with torch.no_grad(), torch.cuda.stream(stream) if stream else nullcontext():
        if stream and ready:
            stream.wait_event(ready)
        held = _mapped(taken, to_host)
        if stream:
            stream.synchronize()
    return held


def _write(copied: Future[dict[Path, Any]]) -> dict[str, File]:
    import torch

    states = copied.result()
    os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), WRITING_NICENESS)
    files = {}
    for path in list(states):
        state = states.pop(path)  # or it would be the loop that gives the memory back, and waits for that
        with path.open("wb") as stream:
            hashed = _Hashed(stream)
            torch.save(state, cast(IO[bytes], hashed), _use_new_zipfile_serialization=False)
            stream.flush()
            os.fsync(stream.fileno())
        files[path.name] = File(uri=path.name, size_bytes=hashed.size, sha256=hashed.digest.hexdigest())
        sync(path.parent)
    return files


class _Hashed:
    """A stream that knows the size and digest of what was written to it."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream
        self.digest, self.size = sha256(), 0

    def write(self, data: Any) -> int:
        count = self._stream.write(data)
        self.digest.update(data)
        self.size += count
        return count

    def flush(self) -> None:
        self._stream.flush()
