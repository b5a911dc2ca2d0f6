"""Curves of a stage in MLflow while it is trained: whoever looks at a stage of a week must not wait for its end."""

from __future__ import annotations

import threading
from contextvars import copy_context
from pathlib import Path

from nvila.components.contracts.errors import Unreachable
from nvila.components.contracts.meter import METER
from nvila.components.contracts.text import say
from nvila.components.tracking.redact import tell

EVERY_SECONDS = 30.0
"""Between two looks at what the stage has written."""


class Live:
    """Tells MLflow of new lines while its context lasts, in a thread that training never waits for.

    It begins when the stage has measured itself for the first time in this attempt: its processes have been forked
    then, and logs of an attempt before are what its checkpoint has.
    """

    def __init__(self, run_dir: Path, step: str, folder: Path, began: float) -> None:
        self.told = -1
        """The last optimizer step that MLflow has been told of."""
        self._run_dir, self._step, self._folder, self._began = run_dir, step, folder, began
        self._over = threading.Event()
        self._thread = threading.Thread(target=copy_context().run, args=(self._work,), daemon=True)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _work(self) -> None:
        before = ""
        while not self._over.wait(EVERY_SECONDS):
            if not self._measured():
                continue
            try:
                self._tell()
                before = ""
            except Exception as error:  # whatever it is, the record at the step's end tries again
                kind = "" if isinstance(error, Unreachable) else f"{type(error).__name__}: "
                why = tell(f"{kind}{error}")
                if why != before:
                    say(f"{self._step}: its curves are not in MLflow yet: {why}")
                before = why

    def _measured(self) -> bool:
        try:
            return (self._folder / METER).stat().st_mtime >= self._began
        except OSError:
            return False

    def _tell(self) -> None:
        from nvila.components.tracking.runs import add_curve

        self.told = add_curve(self._run_dir, self._step, self._folder, self._began, self.told)
