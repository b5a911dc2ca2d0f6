"""Six steps of the real engine in every way it can be set, beside plain PyTorch. A script, by hand:

    .venv/bin/python tests/components/train/matrix.py --world 1 2 --zero 0 1 2 3 --micro 1 4 8 --precision fp32 bf16

It says how far weights are from those of plain_torch.py, as a share of the distance that they moved, and ends with 1
where one way is further than its tolerance. test_arithmetic.py runs a few of them, another few each day.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from nvila.components.contracts.recipe.train import Run, Stage
from nvila.components.train.job import Job

TOLERANCE = {"fp32": 1e-4, "bf16": 0.04, "bf16 ZeRO 3": 0.1}
"""Of the distance that the weights moved. In bf16 the rounding of activations and of single gradients leaves 0.026; one
step of AdamW on nothing before the first leaves 0.3. DeepSpeed's linear layers of ZeRO 3 round a product before they
add the bias and after, torch's once: on a CPU that leaves 0.057, and 0.018 without `memory_efficient_linear`."""
STAGE = {
    "name": "matrix",
    "trainable": ["vision_tower", "mm_projector", "llm"],
    "data": {"s.sft": 6},
    "batch": 8,
    "learning_rate": 1e-3,
    "warmup_ratio": 0.0,
    "clip_norm": 0.5,
    "weight_decay": 0.1,
}
"""Six steps over the same eight questions. Two gradients in three are clipped."""
PATIENCE_SECONDS = 900
"""For a job that takes half a minute on two idle cores; a rank that is still there by then shows where it waits."""
ANSWERS = ["red", "no", "yes", "blue", "green", "no", "yes", "red green blue " * 12]
"""Seven of a word, and one of a hundred tokens and more."""


@dataclass(frozen=True)
class Way:
    """How the engine is set."""

    world: int
    zero: int
    micro: int
    precision: str
    offload: str = "none"
    weighting: str = "token"
    checkpointing: bool = False
    packing: str = "auto"

    def __str__(self) -> str:
        words = [f"{self.world} ranks", f"ZeRO {self.zero}", f"micro batch {self.micro}", self.precision]
        words += ["offload"] * (self.offload != "none") + ["by device batch"] * (self.weighting != "token")
        words += [self.packing] * (self.packing != "auto")
        return ", ".join(words + ["checkpointing"] * self.checkpointing)

    @property
    def tolerance(self) -> float:
        """Of this way."""
        return TOLERANCE["bf16 ZeRO 3" if (self.precision, self.zero) == ("bf16", 3) else self.precision]

    def job(self, model: str, samples: str, out: Path, **stage: Any) -> Job:
        """The job of this way."""
        out.mkdir(parents=True)
        run = {"precision": self.precision, "zero": self.zero, "gpus": self.world, "offload": self.offload}
        run |= {"loss_weighting": self.weighting, "checkpoint_seconds": 3600.0, "packing": self.packing}
        row = STAGE | {"micro_batch": self.micro, "gradient_checkpointing": self.checkpointing} | stage
        return Job(
            stage=Stage.model_validate(row),
            run=Run.model_validate(run),
            seed=0,
            model=model,
            samples=samples,
            out=str(out),
        )


def ways(
    worlds: Sequence[int] = (1, 2),
    zeros: Sequence[int] = (0, 1, 2, 3),
    micros: Sequence[int] = (1, 4, 8),
    precisions: Sequence[str] = ("fp32", "bf16"),
) -> Iterator[Way]:
    """All of them: batches that ranks cannot share, and offload without what is shared, are none."""
    for world, zero, micro, precision in itertools.product(worlds, zeros, micros, precisions):
        if world * micro > STAGE["batch"]:
            continue
        yield Way(world, zero, micro, precision)
        if zero >= 2:
            yield Way(world, zero, micro, precision, offload="cpu")
        if micro == 4:
            yield Way(world, zero, micro, precision, weighting="device_batch")
        yield Way(world, zero, micro, precision, packing="grouped" if micro == 8 else "packed")
        if zero in (0, 3) and micro == 4:
            yield Way(world, zero, micro, precision, checkpointing=True)


def write_answers(root: Path, path: Path, blind: int = 0) -> str:
    """The sample table of `ANSWERS`, about pictures `sft-N.png` of a folder; the first `blind` are about none."""
    from nvila.components.data.samples import write_samples

    rows = []
    for i, answer in enumerate(ANSWERS):
        question = "Which colour is it?" if i < blind else "<image>\nWhich colour is it?"
        turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
        row = {"id": f"s/sft/{i}", "source": "s", "kind": "image", "split": "sft", "root": str(root), "line": i}
        media = [] if i < blind else [f"sft-{i}.png"]
        row |= {"media": media, "media_sha256": [""] * len(media), "conversations": json.dumps(turns)}
        rows.append(row | {"question": "Which colour is it?", "answer": answer})
    write_samples(path, rows)
    return str(path)


def weights(folder: str | Path) -> dict[str, Any]:
    """A checkpoint's tensors in float32, by the model's names."""
    from safetensors.torch import load_file

    named = {}
    for part in ("vision_tower", "mm_projector", "llm"):
        for name, tensor in load_file(Path(folder, part, "model.safetensors")).items():
            named[f"{part}.{name.removeprefix('vision_model.')}"] = tensor.float()
    return named


def apart(job: Job, masters: dict[str, Any]) -> float:
    """How far a job's weights are from plain torch's, as a share of the distance that these moved."""
    import torch

    def low(tensor: Any) -> Any:
        return tensor.bfloat16().float() if job.run.precision == "bf16" else tensor

    before, after = weights(job.model), weights(Path(job.out, "model"))
    assert after.keys() == masters.keys()
    moved = torch.cat([(low(master) - low(before[name])).flatten() for name, master in masters.items()])
    off = torch.cat([(low(master) - after[name]).flatten() for name, master in masters.items()])
    return float(off.norm() / moved.norm())


class Known:
    """What plain torch makes of jobs, each kind once."""

    def __init__(self) -> None:
        self._found: dict[tuple[Any, ...], tuple[dict[str, Any], list[float], list[int]]] = {}

    def of(self, job: Job) -> tuple[dict[str, Any], list[float], list[int]]:
        """Weights, losses and tokens; micro batches and ranks matter only where the mean is over them."""
        import plain_torch

        by_batch = job.run.loss_weighting == "device_batch"
        micro = job.stage.samples_at_once(job.run.gpus) if by_batch else None
        key = (job.run.precision, micro, job.samples, tuple(job.stage.data.items()))
        if key not in self._found:
            self._found[key] = plain_torch.plain(job, micro)
        return self._found[key]


def on_ranks(jobs: list[Job], world: int) -> None:
    """Train jobs one after the other by processes that meet as under torchrun: at a store that is kept here."""
    from torch.distributed import TCPStore

    listing = Path(jobs[0].out).parent / f"jobs-{world}.jsonl"
    listing.write_text("\n".join(job.model_dump_json() for job in jobs))
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    variables = {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port)}
    variables |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "DS_LOG_LEVEL": "warning"}
    command = [sys.executable, str(Path(__file__).with_name("plain_torch.py")), str(listing)]
    ranks = [
        psutil.Popen(command, env=os.environ | variables | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(world)
    ]
    _, alive = psutil.wait_procs(ranks, timeout=PATIENCE_SECONDS * len(jobs))
    for process in [one for rank in alive for one in (rank, *rank.children())]:
        process.send_signal(signal.SIGUSR1)  # the stacks of all its threads on stderr
        time.sleep(1)
        process.kill()
    assert not alive, "a rank did not end: the stacks of the ranks, each with its loader, are on stderr"
    assert [rank.wait() for rank in ranks] == [0] * world


def small(folder: Path) -> tuple[str, str]:
    """The model and the pictures of the tests, and the answers' table."""
    file = Path(__file__).parents[1] / "conftest.py"
    sys.path[:0] = [str(file.parent), str(file.parents[1])]
    spec = importlib.util.spec_from_file_location("small_parts", file)
    assert spec and spec.loader
    parts = importlib.util.module_from_spec(spec)
    sys.modules["small_parts"] = parts
    spec.loader.exec_module(parts)
    rows = [row for n in range(len(ANSWERS)) for row in parts._picture_rows(folder, "sft", n)]
    parts._save_model(folder / "model", [turn["value"] for row in rows for turn in json.loads(row["conversations"])])
    return str(folder / "model"), write_answers(folder, folder / "samples.parquet")


def main() -> int:
    """Run the ways of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--world", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--zero", type=int, nargs="+", default=[0, 1, 2, 3])
    parser.add_argument("--micro", type=int, nargs="+", default=[1, 4, 8])
    parser.add_argument("--precision", nargs="+", default=["fp32", "bf16"])
    options = parser.parse_args()

    known, far = Known(), []
    with tempfile.TemporaryDirectory() as folder:
        model, samples = small(Path(folder))
        chosen = list(ways(options.world, options.zero, options.micro, options.precision))
        for world in options.world:
            jobs = {
                way: way.job(model, samples, Path(folder, str(n))) for n, way in enumerate(chosen) if way.world == world
            }
            on_ranks(list(jobs.values()), world)
            for way, job in jobs.items():
                off = apart(job, known.of(job)[0])
                print(f"{off:.1e}  {way}", flush=True)
                far += [way] if off > way.tolerance else []
    print(f"{len(chosen)} ways, {len(far)} too far" + "".join(f"\n  {way}" for way in far))
    return 1 if far else 0


if __name__ == "__main__":
    sys.exit(main())
