"""`make bench`: measures each area and writes runs/bench/AREA.json, every row beside a baseline of the same minute.

An area is a module beside this one with `rows()`. A ratio above 1 means that ours takes more than the baseline; where
a row says how many times better ours has to be, the table shows it beside how many times better it is.
"""

from __future__ import annotations

import importlib
import itertools
import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

HERE = Path(__file__).parent
OUT = Path("runs/bench")


@dataclass(frozen=True)
class Row:
    """One measurement."""

    work: str
    unit: str
    baseline: float
    ours: float
    baseline_is: str
    at_least: float | None = None
    """How many times better than the baseline is wanted."""

    @property
    def ratio(self) -> float:
        """Ours over the baseline."""
        return self.ours / self.baseline


def areas() -> Iterator[str]:
    """Names of the areas: every module here but this one."""
    return (path.stem for path in sorted(HERE.glob("*.py")) if path.stem != "run")


def machine() -> dict[str, Any]:
    """Where and with what it was measured."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    return {
        "cpu": platform.processor() or platform.machine(),
        "cpus": len(os.sched_getaffinity(0)),
        "load": os.getloadavg()[0],
        "python": platform.python_version(),
        "gpu": _gpu(),
        "versions": {name: version(name) for name in ("kfp", "mlflow", "torch") if find_spec(name)},
        "commit": commit,
        "command": " ".join(sys.argv),
    }


def _gpu() -> str | None:
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else None


def main() -> None:
    """Measure the areas named on the command line, or all."""
    sys.path[:0] = map(str, (HERE, HERE.parent, HERE.parent / "components"))
    OUT.mkdir(parents=True, exist_ok=True)
    console = Console(width=140)
    where = machine()
    console.print(where)
    for area in sys.argv[1:] or areas():
        rows = []
        for row in itertools.starmap(Row, importlib.import_module(area).rows()):
            rows.append(row)
            print(f"{area}: {row.work}: {row.ours:.3g} {row.unit}, {row.baseline_is}: {row.baseline:.3g}", flush=True)
        names = ("work", "unit", "baseline", "ours", "ratio", "better", "at least", "baseline is")
        table = Table(*names, title=area, title_justify="left")
        for row in rows:
            numbers = (
                f"{row.baseline:.3g}",
                f"{row.ours:.3g}",
                f"{row.ratio:.2f}",
                f"{1 / row.ratio:.2f}x" if row.ratio else "none",
            )
            wanted = f"{row.at_least:.3g}x" if row.at_least else ""
            table.add_row(row.work, row.unit, *numbers, wanted, row.baseline_is)
        console.print(table)
        records = [asdict(row) | {"ratio": row.ratio} for row in rows]
        (OUT / f"{area}.json").write_text(json.dumps({"machine": where, "rows": records}, indent=1) + "\n")


if __name__ == "__main__":
    main()
