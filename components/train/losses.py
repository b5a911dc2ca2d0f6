"""`loss.jsonl`: one line per optimizer step, written by the worker of rank 0, read by the step and the report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from nvila.components.contracts.manifest import write_atomic


class LossLog:
    """Appends to the log of an attempt; lines after the checkpoint that is resumed are dropped first."""

    def __init__(self, path: Path, done: int) -> None:
        kept = [record for record in read_losses(path) if record["step"] <= done]
        write_atomic(path, "".join(json.dumps(record) + "\n" for record in kept))
        self._stream = path.open("a", encoding="utf-8")

    def write(self, **record: float) -> None:
        """Append one record; it is in the file when this returns."""
        self._stream.write(json.dumps(record) + "\n")
        self._stream.flush()


def read_losses(path: Path) -> list[dict[str, Any]]:
    """Records of a log in the order of their steps; a line cut off by a crash of the machine is left out."""
    records = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else ():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(record, dict) and "step" in record and "loss" in record:
            records.append(record)
    return records
