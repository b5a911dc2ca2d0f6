"""What a process holds at most under ZeRO 3, with two of them and with one: loading, steps, saving. By hand:

    .venv/bin/python tests/bench/train_rows/sharing.py 500 fp32

A random NVILA of so many million parameters is trained for two steps by real processes; each tells its peak (VmHWM) of
every part. One process alone takes about 20 bytes a parameter.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

HERE = Path(__file__)
AT_LEAST = 1 / 0.65
PARTS = ("loading", "steps", "saving")
WIDTHS = {150: (1024, 11), 500: (1536, 17)}
"""Width and blocks of decoders of about so many million parameters, with 300 tokens and an MLP four times as wide."""
Row = tuple[str, str, float, float, str, float | None]


def rows(millions: int = 500, precision: str = "fp32") -> Iterator[Row]:
    """The peak of each part, and of all; and what a process takes that has no model."""
    with tempfile.TemporaryDirectory() as folder:
        samples, model = _made(Path(folder), millions)
        alone, shared = (_peaks(Path(folder, str(world)), model, samples, precision, world) for world in (1, 2))
    for part in (*PARTS, "all"):
        work = f"peak of a process, {part}: ZeRO 3, {millions}M parameters, {precision}, two processes"
        at_least = AT_LEAST if part == "all" else None
        yield work, "MB", max(p[part] for p in alone), max(p[part] for p in shared), "one process", at_least
    before = max(p["start"] for p in shared)
    yield (
        "of it before there is a model: Python, torch, DeepSpeed",
        "MB",
        alone[0]["start"],
        before,
        "one process",
        None,
    )


def _made(folder: Path, millions: int) -> tuple[str, str]:
    """Sample table and checkpoint."""
    from nvila.components.model.checkpoint.native import read_config, save_native
    from nvila.components.model.fresh import init_model
    from nvila.components.model.text.tokenizer import load_tokenizer

    small, samples = _matrix().small(folder)
    hidden, blocks = WIDTHS[millions]
    llm = {"hidden_size": hidden, "num_hidden_layers": blocks, "intermediate_size": 4 * hidden}
    llm |= {"num_attention_heads": hidden // 64, "num_key_value_heads": hidden // 64}
    config = read_config(Path(small))
    tokenizer = load_tokenizer(Path(small, "llm"), Path(small))
    made = folder / "large"
    save_native(init_model(replace(config, llm={**config.llm, **llm}), tokenizer, seed=0), tokenizer, made)
    return samples, str(made)


def _matrix() -> Any:
    sys.path.insert(0, str(HERE.parents[2] / "components/train"))
    return importlib.import_module("matrix")


def _peaks(folder: Path, model: str, samples: str, precision: str, world: int) -> list[dict[str, float]]:
    """Of each process, by part."""
    from torch.distributed import TCPStore

    job = _matrix().Way(world, 3, 1, precision).job(model, samples, folder, data={"s.sft": 2})
    (folder / "job.json").write_text(job.model_dump_json())
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    variables = {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port)}
    variables |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "DS_LOG_LEVEL": "warning", "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen(
            [sys.executable, str(HERE), str(folder / "job.json")],
            env=os.environ | variables | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(world)
    ]
    assert [rank.wait() for rank in ranks] == [0] * world
    return [json.loads(Path(folder, f"peak-{rank}").read_text()) for rank in range(world)]


def _train(job_path: Path) -> None:
    """One process: the real stage, and what it held at most from one point to the next."""
    import torch

    from nvila.components.train import loop
    from nvila.components.train.engine import Engine, join
    from nvila.components.train.job import Job

    peaks: dict[str, float] = {}
    start, weights = loop.start, Engine.weights

    def note(part: str) -> None:
        lines = Path("/proc/self/status").read_text().splitlines()
        peaks[part] = next(int(line.split()[1]) / 1000 for line in lines if line.startswith("VmHWM:"))
        Path("/proc/self/clear_refs").write_text("5")

    def started(*arguments: Any) -> Engine:
        note("loading")
        return start(*arguments)

    def asked(engine: Engine) -> Any:
        note("steps")
        return weights(engine)

    class Never:
        asked = False

    loop.start, Engine.weights = started, asked  # type: ignore[assignment, method-assign]
    torch.set_num_threads(1)
    loader, loop_join = loop.receive, join

    def received(*arguments: Any) -> Any:
        loop_join()
        importlib.import_module("transformers.models.qwen2.modeling_qwen2")
        importlib.import_module("transformers.models.siglip.modeling_siglip")
        note("start")
        return loader(*arguments)

    loop.receive = received
    loop.train(Job.model_validate_json(job_path.read_bytes()), Never())  # type: ignore[arg-type]
    note("saving")
    peaks["all"] = max(peaks.values())
    job_path.with_name(f"peak-{os.environ['RANK']}").write_text(json.dumps(peaks))
    os._exit(0)


if __name__ == "__main__":
    if sys.argv[1].endswith(".json"):
        _train(Path(sys.argv[1]))
    for work, unit, alone, shared, what, _ in rows(int(sys.argv[1]), sys.argv[2]):
        print(f"{work}: {shared:.0f} {unit}, {what} {alone:.0f}: {shared / alone:.2f}", flush=True)
