"""Makes all changes of docs/extend.md on one copy of the tree and runs `micro` with each of them in use."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from test_extend import CHANGES, applied, copied, environment

OPTIONS = (
    "train.precision=bf16-mixed",
    "rollout.target=alias",
    'evaluate.metrics={"digits": "anls"}',
    "data.sources.shapes.path=data/tables/shapes",
    "data.sources.shapes.layout=csv",
    "data.sources.shapes.demo=null",
)
DEMO = """\
from nvila.components.contracts.recipe.data import Source
from nvila.components.data.demo import ensure
ensure(Source(name="shapes", kind="image", path="data/tables/shapes", demo="shapes", demo_scale=0.02))
"""


def main() -> int:
    """Run it, print what is as it should be and what is not."""
    with tempfile.TemporaryDirectory() as folder:
        tree = copied(Path(folder) / "tree")
        for change in CHANGES:
            applied(change, tree)
        here: dict[str, Any] = {"cwd": tree, "env": environment(tree)}
        subprocess.run([sys.executable, "-c", DEMO], check=True, **here)
        as_tables(tree / "data/tables/shapes")
        options = [word for option in OPTIONS for word in ("-o", option)]
        began = time.monotonic()
        ran = subprocess.run([sys.executable, "-m", "nvila.pipelines.cli", "run", "micro", *options], **here)
        print(f"\n{time.monotonic() - began:.0f} seconds")
        held = list(checks(tree)) if ran.returncode == 0 else []
    for said, holds in held:
        print("as it should be:" if holds else "NOT AS IT SHOULD BE:", said)
    return 0 if held and all(holds for _, holds in held) else 1


def as_tables(source: Path) -> None:
    """The conversations of a demonstration source as CSV; of a longer one its first question."""
    for split in ("sft", "captions", "heldout"):
        file = source / f"{split}.json"
        with file.with_suffix(".csv").open("w", encoding="utf-8", newline="") as table:
            rows = csv.writer(table)
            rows.writerow(["id", "image", "question", "answer"])
            for record in json.loads(file.read_text(encoding="utf-8")):
                question, answer = (turn["value"] for turn in record["conversations"][:2])
                rows.writerow([record["id"], record["image"], question.replace("<image>", "").strip(), answer])
        file.unlink()


def checks(tree: Path) -> Iterator[tuple[str, bool]]:
    """What only the changed tree can show, each with whether it does."""
    summary = json.loads((tree / "runs/latest/summary.json").read_text(encoding="utf-8"))
    metrics = {source: row["full"]["metric"] for source, row in summary["accuracy"].items()}
    yield f"metric: {metrics}", metrics == {"shapes": "accuracy", "digits": "anls", "clips": "accuracy"}
    yield f"stages: {list(summary['stages'])}", list(summary["stages"])[-1] == "train-6"
    records = result(tree, "validate")["records"]["shapes"]
    yield f"layout: shapes has {records}", min(records[split] for split in ("sft", "captions", "heldout")) > 0
    served = (summary["decision"], summary["endpoint"])
    yield f"target: {served}", served == ("promoted", None)
    trained = {result(tree, name)["precision"] for name in summary["stages"] if name.startswith("train-")}
    yield f"precision: {trained}", trained == {"bf16-mixed"}


def result(tree: Path, step: str) -> dict[str, Any]:
    """What a step of the one run has told."""
    (manifest,) = (tree / "store" / step).glob("*/manifest.json")
    told: dict[str, Any] = json.loads(manifest.read_text(encoding="utf-8"))["result"]
    return told


if __name__ == "__main__":
    sys.exit(main())
