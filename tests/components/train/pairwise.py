"""Ways to train a stage in which every pair of options occurs that an allowed way has; few, by greedy choice.

By hand, such a choice, or the whole matrix (a quarter of an hour):

    .venv/bin/python tests/components/train/pairwise.py [--whole]
"""

from __future__ import annotations

import argparse
import itertools
import os
import random
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import astuple, fields
from pathlib import Path
from typing import Any

from nvila.components.contracts.recipe.matrix import Cell, cells, refusals
from nvila.components.contracts.recipe.methods import ADAPTERS
from nvila.components.contracts.recipe.train import Run, Stage
from nvila.components.train.job import Job

NEEDS_TRANSFORMER_ENGINE = ("fp8-delayed", "fp8-block")
STEPS = 3
STAGE: dict[str, Any] = {
    "name": "pairwise",
    "data": {"s.sft": STEPS},
    "batch": 8,
    "micro_batch": 4,
    "learning_rate": 1e-3,
    "warmup_ratio": 0.0,
    "lora": {"rank": 4, "alpha": 8},
}
WITHIN = {"fp32": 1e-4, "bf16": 0.01, "fp8-current": 0.03}
"""Of the first loss: no option but these changes what the model computes before its first step."""
FOUR_BITS = 0.1
"""The same where the decoder's weights are in four bits."""
Pair = tuple[tuple[str, Any], tuple[str, Any]]


def here() -> list[Cell]:
    """The allowed ways that need no GPU."""
    return [cell for cell in cells() if not refusals(cell) and cell.precision not in NEEDS_TRANSFORMER_ENGINE]


def cover(candidates: Sequence[Cell], seed: int = 0) -> list[Cell]:
    """Some of them in which each of their pairs of options occurs."""
    candidates = random.Random(seed).sample(candidates, len(candidates))
    left = {pair for cell in candidates for pair in pairs(cell)}
    chosen = []
    while left:
        best = max(candidates, key=lambda cell: sum(pair in left for pair in pairs(cell)))
        chosen.append(best)
        left.difference_update(pairs(best))
    return chosen


def pairs(cell: Cell) -> Iterator[Pair]:
    """Each two of its options."""
    options = zip((field.name for field in fields(cell)), astuple(cell), strict=True)
    return itertools.combinations(options, 2)


def job(cell: Cell, model: str, samples: str, out: Path) -> Job:
    """The job of a way: adapters where a part learns by them; the projector learns in any case."""
    out.mkdir(parents=True)
    learning = {"vision_tower": cell.vision_tower, "mm_projector": "full", "llm": cell.llm}
    methods = {part: how for part, how in learning.items() if how not in ("frozen", "full")}
    row = STAGE | {"trainable": [part for part, how in learning.items() if how != "frozen"], "methods": methods}
    if not ADAPTERS & set(methods.values()):
        row = {name: value for name, value in row.items() if name != "lora"}
    run = {"precision": cell.precision, "zero": cell.zero, "offload": cell.offload, "packing": cell.packing}
    run |= {"checkpoint_seconds": 3600.0, "fp8": {"min_features": 16}}
    return Job(
        stage=Stage.model_validate(row),
        run=Run.model_validate(run),
        seed=0,
        model=model,
        samples=samples,
        out=str(out),
    )


def wrong(cell: Cell, job: Job, first_loss: float) -> list[str]:
    """What a trained job did that its way does not say; `first_loss` is that of the model before."""
    import torch
    from matrix import weights

    from nvila.components.train.losses import read_losses

    said = []
    losses = [record["loss"] for record in read_losses(Path(job.out, "loss.jsonl"))]
    if len(losses) != STEPS:
        said.append(f"{len(losses)} steps")
    within = FOUR_BITS if cell.llm == "qlora" else WITHIN[cell.precision]
    if abs(losses[0] - first_loss) > within * first_loss:
        said.append(f"the first loss is {losses[0]:.4f} and not {first_loss:.4f}")
    if not losses[-1] < losses[0]:
        said.append(f"the loss went from {losses[0]:.4f} to {losses[-1]:.4f}")
    low = torch.float32 if cell.precision == "fp32" else torch.bfloat16
    before, after = weights(job.model), weights(Path(job.out, "model"))
    if before.keys() != after.keys():
        said.append("the model has other tensors")
    moved = {name for name in before if not torch.equal(before[name].to(low).float(), after[name])}
    for part, how in (("vision_tower", cell.vision_tower), ("mm_projector", "full"), ("llm", cell.llm)):
        changed = {name for name in moved if name.startswith(part)}
        if bool(changed) != (how != "frozen"):
            said.append(f"{part}, {how}: {len(changed)} tensors have changed")
        if how == "layernorm" and any("layer_norm" not in name for name in changed):
            said.append(f"{part}: more than layer norms have changed")
        if how in ADAPTERS and not all(name.endswith(("_proj.weight", "fc1.weight", "fc2.weight")) for name in changed):
            said.append(f"{part}: more than the Linears of its blocks has changed")
    return said


def first_loss(model: str, samples: str, out: Path) -> float:
    """Of the model before training, as plain torch has it."""
    import plain_torch

    cell = Cell(0, "fp32", "full", "full", "none", "padded")
    return plain_torch.plain(job(cell, model, samples, out))[1][0]


class Never:
    """Nobody asks to stop."""

    asked = False


def main() -> int:
    """Train them one after the other in this process."""
    from matrix import small

    from nvila.components.contracts.environment import Environment, entered, named
    from nvila.components.serve.ports import free_port
    from nvila.components.train.loop import train

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--whole", action="store_true", help="every allowed way that needs no GPU")
    options = parser.parse_args()
    os.environ |= named(rank=0, local_rank=0, world=1) | {"MASTER_ADDR": "127.0.0.1"}
    os.environ["MASTER_PORT"] = str(free_port("127.0.0.1"))
    chosen, bad = here() if options.whole else cover(here()), 0
    with tempfile.TemporaryDirectory() as folder, entered(Environment.read()):
        root = Path(folder)
        model, samples = small(root)
        loss = first_loss(model, samples, root / "plain")
        for number, cell in enumerate(chosen):
            one = job(cell, model, samples, root / str(number))
            train(one, Never())  # type: ignore[arg-type]
            said = wrong(cell, one, loss)
            bad += bool(said)
            print(f"{number + 1}/{len(chosen)} {cell}: {'; '.join(said) or 'as it says'}", flush=True)
            shutil.rmtree(one.out)
    print(f"{len(chosen)} ways, {bad} wrong")
    return int(bool(bad))


if __name__ == "__main__":
    sys.exit(main())
