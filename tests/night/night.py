"""`make night`: every scenario with every kill point, on the test cluster of this machine.

    .ci/cluster .venv/bin/python tests/night/night.py [--again] [--only SCENARIO[:KILL]]...

Each cell's row lies in runs/night/; a cell that has one is not played again without `--again`. Prints the table, and
ends with 1 where anything in it is wrong.
"""

from __future__ import annotations

import argparse
import json
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

sys.path.append(str(Path(__file__).parent))
from cell import Row, run_cell
from ground import Ground, prepared
from kill_points import KILLS
from rich.console import Console
from rich.table import Table
from scenarios import SCENARIOS, Scenario

OUT = Path("runs/night")


def cells(only: Sequence[str] = ()) -> Iterator[tuple[Scenario, str]]:
    """All that these names choose, `SCENARIO` or `SCENARIO:KILL`; without names all there are.

    With vLLM, which takes minutes, nothing is killed.
    """
    for scenario in SCENARIOS:
        for kill in ["none"] if scenario.served.real else KILLS:
            if not only or scenario.name in only or f"{scenario.name}:{kill}" in only:
                yield scenario, kill


def place(scenario: str, kill: str) -> Path:
    """Of a cell's row."""
    return OUT / f"{scenario}-{kill}.json".replace(" ", "-")


def play(ground: Ground, scenario: Scenario, kill: str) -> Row:
    """One cell; what goes wrong in the test itself is its fault, too."""
    try:
        return run_cell(ground, scenario, kill)
    except Exception:
        said = traceback.format_exc()
        return Row(scenario.name, kill, False, "did not come to an end", 0.0, 0, 0, 0, 0, [said[-4000:]])


def table(rows: Sequence[Row]) -> Table:
    """For people."""
    made = Table("scenario", "kill point", "end state", "seconds", "asked", "lost", "wrong", "broken", "")
    for row in rows:
        numbers = (f"{row.seconds:.0f}", str(row.asked), str(row.lost), str(row.wrong), str(row.broken))
        made.add_row(row.scenario, row.kill, row.end, *numbers, "" if row.right else "WRONG")
    return made


def main(arguments: Sequence[str]) -> int:
    """What the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--again", action="store_true", help="play cells that have a row, too")
    parser.add_argument("--only", action="append", default=[], metavar="SCENARIO[:KILL]")
    given = parser.parse_args(arguments)
    OUT.mkdir(parents=True, exist_ok=True)
    rows, console = list[Row](), Console(width=160)
    with ExitStack() as stack:
        ground: Ground | None = None
        for scenario, kill in cells(given.only):
            path = place(scenario.name, kill)
            if path.exists() and not given.again:
                rows.append(Row(**json.loads(path.read_text())))
                continue
            ground = ground or stack.enter_context(prepared())
            rows.append(row := play(ground, scenario, kill))
            path.write_text(json.dumps(row.dump(), indent=1) + "\n")
            print(f"{row.scenario}, {row.kill}: {row.end}, {row.seconds:.0f} s", *row.faults, sep="\n  ", flush=True)
    console.print(table(rows))
    return 0 if rows and all(row.right for row in rows) else 1


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
