"""The losses of FP8 beside those of bf16: 200 optimizer steps of the real engine from three seeds. By hand:

    OMP_NUM_THREADS=1 .venv/bin/python tests/bench/train_rows/parity.py --batch 16 --rate 1e-3

A decoder of the widths of `tiny` learns sentences of a random grammar, each once, beside a picture. What it ends at is
the grammar's entropy and what it has not learnt yet: above zero, so that a share of it means something. It ends with 1
where a seed is further apart than a hundredth, and further than bf16's seeds are from each other.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import random
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

HERE = Path(__file__)
STEPS, SEEDS, LAST = 200, (0, 1, 2), 20
WORDS = [
    "red",
    "green",
    "blue",
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "left",
    "right",
    "above",
    "below",
    "near",
    "far",
    "big",
    "small",
    "round",
]
FOLLOWERS = 3
"""Words that may follow each word."""
APART = 0.01


@dataclass(frozen=True)
class Way:
    """How both are trained."""

    batch: int
    rate: float
    scaling: str

    @property
    def runs(self) -> list[dict[str, Any]]:
        """In bf16 and in FP8."""
        fp8 = {"min_features": 128, "scaling": self.scaling}
        return [{"precision": "bf16"}, {"precision": "fp8-current", "fp8": fp8}]


class Never:
    """Nobody asks to stop."""

    asked = False


def main() -> int:
    """Train six times and compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--scaling", choices=["tensorwise", "rowwise"], default="tensorwise")
    way = Way(**vars(parser.parse_args()))
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    for name, value in (alone | {"DS_LOG_LEVEL": "warning"}).items():
        os.environ.setdefault(name, value)
    import torch

    import nvila.components.train.loop as loop

    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {STEPS} steps, {way}", flush=True)
    ends: dict[str, list[float]] = {"bf16": [], "fp8-current": []}
    with tempfile.TemporaryDirectory() as folder:
        for seed in SEEDS:
            model, samples = _made(Path(folder, str(seed)), seed, way)
            for run in way.runs:
                began, out = time.monotonic(), Path(folder, str(seed), str(run["precision"]))
                loop.train(_job(run, seed, model, samples, out, way), Never())  # type: ignore[arg-type]
                losses = [json.loads(line)["loss"] for line in (out / "loss.jsonl").read_text().splitlines()]
                assert len(losses) == STEPS
                end = fmean(losses[-LAST:])
                ends[str(run["precision"])].append(end)
                words = f"seed {seed} {run['precision']}: first {losses[0]:.3f}, mean of the last {LAST} {end:.4f}"
                print(f"{words}, {time.monotonic() - began:.0f} s", flush=True)
    spread = max(ends["bf16"]) - min(ends["bf16"])
    far = 0
    for seed, bf16, fp8 in zip(SEEDS, *ends.values(), strict=True):
        print(f"seed {seed}: fp8-current {fp8 / bf16 - 1:+.2%} of bf16")
        far += abs(fp8 / bf16 - 1) > APART and abs(fp8 - bf16) > spread
    mean = fmean(ends["fp8-current"]) / fmean(ends["bf16"]) - 1
    print(f"all: {mean:+.2%}; bf16's seeds differ by {spread:.4f} ({spread / fmean(ends['bf16']):.2%})")
    return 1 if far else 0


def _job(run: dict[str, Any], seed: int, model: str, samples: str, out: Path, way: Way) -> Any:
    from nvila.components.contracts.recipe.train import Run, Stage
    from nvila.components.train.job import Job

    out.mkdir()
    stage = {"name": "parity", "trainable": ["mm_projector", "llm"], "learning_rate": way.rate, "batch": way.batch}
    return Job(
        stage=Stage.model_validate(stage | {"data": {"s.sft": 1}}),
        run=Run.model_validate(run | {"checkpoint_seconds": 3600.0}),
        seed=seed,
        model=model,
        samples=samples,
        out=str(out),
    )


def _made(folder: Path, seed: int, way: Way) -> tuple[str, str]:
    """A checkpoint of `tiny`'s widths, and the table of its sentences."""
    from nvila.components.data.samples import write_samples
    from nvila.components.model.checkpoint.native import read_config, save_native
    from nvila.components.model.fresh import init_model
    from nvila.components.model.text.tokenizer import train_tokenizer

    folder.mkdir()
    sys.path.insert(0, str(HERE.parents[2] / "components/train"))
    small, _ = importlib.import_module("matrix").small(folder)
    rng = random.Random(0)  # one grammar: seeds draw weights and order, so that bf16's spread is theirs
    follow = {word: rng.sample(WORDS, FOLLOWERS) for word in WORDS}
    sentences = [_sentence(rng, follow) for _ in range(STEPS * way.batch)]
    rows = []
    for i, answer in enumerate(sentences):
        turns = [{"from": "human", "value": "<image>\nGo on."}, {"from": "gpt", "value": answer}]
        row = {"id": f"s/sft/{i}", "source": "s", "kind": "image", "split": "sft", "root": str(folder), "line": i}
        row |= {"media": [f"sft-{i % 8}.png"], "media_sha256": [""], "conversations": json.dumps(turns)}
        rows.append(row | {"question": "Go on.", "answer": answer})
    write_samples(folder / "sentences.parquet", rows)
    llm = {"hidden_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = read_config(Path(small))
    tokenizer = train_tokenizer(["Go on.", *sentences[:200]], 300)
    made = init_model(replace(config, llm={**config.llm, **llm, "intermediate_size": 256}), tokenizer, seed)
    save_native(made, tokenizer, folder / "wide")
    return str(folder / "wide"), str(folder / "sentences.parquet")


def _sentence(rng: random.Random, follow: dict[str, list[str]]) -> str:
    words = [rng.choice(WORDS)]
    while len(words) < 24:
        words.append(rng.choices(follow[words[-1]], weights=(6, 3, 1))[0])
    return " ".join(words)


if __name__ == "__main__":
    sys.exit(main())
