"""Logs of a stage as JSON lines, written by the worker of rank 0: `loss.jsonl`, a line per optimizer step, and
`skipped.jsonl`, a line per sample left out. Read by the step and the report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from nvila.components.contracts import jsonlines

LOSSES, SKIPPED = "loss.jsonl", "skipped.jsonl"


class StepLog:
    """Appends to a log of a stage; a checkpoint keeps a copy, from which a resume goes on."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._stream = path.open("a", encoding="utf-8")

    def write(self, **record: Any) -> None:
        """Append one record; it is in the file when this returns."""
        self._stream.write(json.dumps(record) + "\n")
        self._stream.flush()


def read_losses(path: Path) -> list[dict[str, Any]]:
    """Records (step, loss, lr, tokens) of `loss.jsonl`; loss is None where a step had no usable sample.

    `lr` is the stage's own rate; parts with another have theirs in `lr_of`.
    """
    return [record for record in read_log(path) if "loss" in record]


def read_log(path: Path) -> list[dict[str, Any]]:
    """Records of a log in the order of their steps; a line cut off by a crash of the machine is left out."""
    return [record for record in jsonlines.whole(path) if isinstance(record.get("step"), int)]
