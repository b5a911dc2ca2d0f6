"""Values of the chart drawn at random from its schema: how many of what comes out Kubernetes 1.29 to 1.35 takes.

Alone: `python tests/bench/cluster_rows/drawn.py [SETS [SEED]]`; it ends with 1 where one is refused.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.append(str(Path(__file__).parents[2] / "charts"))
from drawing import Refused, draw, fault

SETS = 500
SEED = 20261128


def rows() -> Iterator[tuple[str, str, float, float, str]]:
    """The sets that are taken."""
    taken = SETS - len(refused(SETS, SEED))
    yield "drawn sets of values, rendered and valid for Kubernetes 1.29 to 1.35", "sets", SETS, taken, "all"


def refused(sets: int, seed: int) -> list[str]:
    """What is wrong with so many rendered sets. Those that the chart's own checks name do not count."""
    found, rendered, named = [], 0, 0
    while rendered < sets:
        number = seed + rendered + named
        try:
            wrong = fault(draw(number))
        except Refused:
            named += 1
            continue
        rendered += 1
        if wrong:
            found.append(f"seed {number}: {wrong}")
            print(found[-1], flush=True)
    print(f"{rendered} sets rendered, {len(found)} refused; {named} more named by the chart's own checks", flush=True)
    return found


if __name__ == "__main__":
    sys.exit(bool(refused(*([int(word) for word in sys.argv[1:]] + [SETS, SEED][len(sys.argv) - 1 :]))))
