"""What a stage says of itself while it trains."""

from __future__ import annotations

import json
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nvila.components.contracts.errors import Preempted
from nvila.components.contracts.gpus import gpu_of
from nvila.components.contracts.meter import Attempt, Reading, measures, read_meter
from nvila.components.train import meter as measuring
from nvila.components.train.energy import Energy
from nvila.components.train.job import Job
from nvila.components.train.loop import StopRequest, train
from nvila.components.train.losses import read_losses

MakeJob = Callable[..., Job]


class Stop(StopRequest):
    """A request that comes after some steps, without signals."""

    def __init__(self, after: int | None = None) -> None:
        self._after, self._looks = after, 0

    @property
    def asked(self) -> bool:  # type: ignore[override]
        self._looks += 1
        return self._after is not None and self._looks >= self._after


@pytest.mark.usefixtures("one_rank")
def test_a_stage_measures_itself(make_job: MakeJob, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A week of training that says nothing but its loss: nobody sees that the loader starves it, or that padding does;
    and of a stage that was cut off, the GPU hours of the first attempt were lost."""
    monkeypatch.setattr(measuring, "READING_SECONDS", 0.0)
    progress = tmp_path / "progress.json"
    monkeypatch.setenv("NVILA_PROGRESS_FILE", str(progress))
    monkeypatch.setenv("NVILA_PROFILE", "all")
    job = make_job("a", stage={"data": {"colours.sft": 1, "clips.sft": 1}, "micro_batch": 4})
    with pytest.raises(Preempted):
        train(job, Stop(after=2))
    train(job, Stop())
    read, losses = read_meter(Path(job.out, "meter.jsonl")), read_losses(Path(job.out, "loss.jsonl"))
    assert [one.step for _, one in read] == [1, 2, 3, 4] == [record["step"] for record in losses]
    assert [round(one.loss, 6) for _, one in read] == [record["loss"] for record in losses]
    assert sum(one.samples for _, one in read) == 32 and len({attempt.began for attempt, _ in read}) == 2
    found = measures(Path(job.out, "meter.jsonl"))
    assert found and found.mfu is None and found.gpu_hours is None and found.rss_bytes > 2**20
    assert 0 < found.loader_wait < 1 and 0 < found.padding < 1 and found.operations_per_second > 0
    lines = [json.loads(line) for line in Path(job.out, "meter.jsonl").read_text().splitlines()]
    assert lines[1]["tokens_per_second"] == pytest.approx(read[0][1].tokens / read[0][1].seconds)
    assert "aten::" in Path(job.out, "profile/table.txt").read_text()
    note = json.loads(progress.read_text())["note"]
    for words in ("loss ", "tokens/s", "samples/s", "GFLOP/s", "loader wait", "padding", "GiB", "lr "):
        assert words in note, note


def test_rates_are_of_everything_that_was_read(tmp_path: Path) -> None:
    """Means of rates that forget how long each lasted, or an MFU over fewer GPUs than there were, are other numbers."""
    attempt = Attempt(began=1.0, startup_seconds=18.0, processes=2, device="NVIDIA H100 80GB HBM3", peak_flops=1e12)
    one = {"time": 1.0, "loss": 1.0, "lr": 0.1, "samples": 10, "rss_bytes": 5, "gpu_bytes": 7}
    fast = Reading(step=1, seconds=1.0, tokens=90, places=100, operations=1e12, waited_seconds=0.0, joules=50.0, **one)
    slow = Reading(step=2, seconds=3.0, tokens=30, places=60, operations=1e12, waited_seconds=2.4, joules=10.0, **one)
    lines = [attempt.model_dump_json(), fast.model_dump_json(), "{", attempt.model_copy(update={"began": 2.0})]
    lines = [line if isinstance(line, str) else line.model_dump_json() for line in [*lines, slow]]
    (tmp_path / "meter.jsonl").write_text("\n".join(lines))
    assert measures(tmp_path / "none.jsonl") is None
    found = measures(tmp_path / "meter.jsonl")
    assert found and found.model_dump() == pytest.approx(
        {
            "tokens_per_second": 30.0,
            "samples_per_second": 5.0,
            "operations_per_second": 5e11,
            "mfu": 0.25,
            "loader_wait": 0.3,
            "padding": 0.25,
            "rss_bytes": 5,
            "gpu_bytes": 7,
            "gpu_hours": 2 * (18 + 18 + 4) / 3600,
            "joules": 60.0,
        }
    )
    assert ", ".join(found.words).endswith(
        "MFU 25%, loader wait 30.0%, padding 25.0%, 0.0 GiB, 0.02 GPU hours, 0.00 kWh"
    )


def test_a_batch_counts_as_what_the_model_makes_of_it(small: Any) -> None:
    """An MFU of operations that were never computed: the counts are held against torch's own."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from nvila.components.data.samples import read_samples
    from nvila.components.model.checkpoint.native import load_native
    from nvila.components.model.feed import Feed
    from nvila.components.model.shape import count
    from nvila.components.model.work import forward

    model, tokenizer = load_native(small.model.dir("model"), dtype="float32")
    model.prepare_for_training()
    samples = read_samples(small.samples.path("samples.parquet"), split="sft")
    batch = Feed(tokenizer, model.config).batch([samples[0], samples[-1], samples[2]])
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        spliced = model.prepare(batch.input_ids, batch.attention_mask, batch.visuals, batch.labels)
        output = model(**batch.forward_arguments())
    seen = measuring.counted(batch, model.config, model.tokens)
    assert seen.positions == int(spliced.attention_mask_BT.sum()) and seen.places == spliced.attention_mask_BT.numel()
    assert seen.samples == 3 and seen.tiles == sum(len(visual.tiles) for visual in batch.visuals)
    parts = forward(count(model.config), seen.load(output.supervised))
    whole = parts["llm"] + 2 * (parts["vision_tower"] + parts["mm_projector"])  # which `prepare` computed too
    # Torch counts the padding, both halves of causal attention, and rows that a matrix product is made larger for.
    assert whole == pytest.approx(counter.get_total_flops(), rel=0.3) and whole < counter.get_total_flops()


def test_a_gpu_is_known_by_what_its_driver_calls_it() -> None:
    """A board of the same name that is clocked lower, or one inside another's name, gives an MFU that is not true."""
    known = {
        "NVIDIA H100 80GB HBM3": "h100",
        "NVIDIA A100-SXM4-80GB": "a100",
        "NVIDIA L40S": "l40s",
        "NVIDIA H200": "h200",
        "NVIDIA L4": "l4",
        "NVIDIA GeForce RTX 4090": "4090",
        "NVIDIA GeForce RTX 4090 D": None,
        "NVIDIA GeForce RTX 4090 Laptop GPU": None,
        "NVIDIA H100 PCIe": None,
        "NVIDIA H100 NVL": None,
        "NVIDIA GH200 480GB": None,
        "NVIDIA RTX A1000": None,
    }
    found = {product: gpu_of(product) for product in known}
    assert {product: gpu and gpu.name for product, gpu in found.items()} == known


def test_energy_is_what_the_counter_rose_by(monkeypatch: pytest.MonkeyPatch) -> None:
    """The counter runs since the driver was loaded: its value is nobody's consumption."""
    import torch

    counter = iter([5_000, 6_500, 9_000])
    library = types.ModuleType("pynvml")
    asked: list[str] = []
    library.__dict__.update(
        NVMLError=RuntimeError,
        nvmlInit=lambda: None,
        nvmlDeviceGetHandleByUUID=lambda name: asked.append(name) or "handle",
        nvmlDeviceGetTotalEnergyConsumption=lambda handle: next(counter),
    )
    monkeypatch.setitem(sys.modules, "pynvml", library)
    gpu = types.SimpleNamespace(uuid="4ab3")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: gpu)
    energy = Energy(torch.device("cuda", 1))
    assert asked == ["GPU-4ab3"] and energy.told
    assert [energy.joules(), energy.joules()] == [1.5, 2.5]
    nothing = Energy(torch.device("cpu"))
    assert not nothing.told and nothing.joules() == 0.0
