"""Stages in FP8 by torchao, on the real engine."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import matrix
import pytest
from test_worker import Stop, losses, weights
from turns import some

from nvila.components.contracts.errors import ConfigError, Preempted
from nvila.components.contracts.results.model import Fp8Products
from nvila.components.precision.products import Products
from nvila.components.train.engine import Engine
from nvila.components.train.job import Job
from nvila.components.train.loop import train

pytestmark = pytest.mark.usefixtures("one_rank")
MakeJob = Callable[..., Job]
FP8 = {"precision": "fp8-current", "fp8": {"min_features": 32}}
TAKEN = {
    f"llm.model.layers.*.{name}": 2
    for name in ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
}
"""Keys and values of the little decoder have 16 features."""


@pytest.fixture
def products(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[Any, ...]]]:
    """Types and sizes of what torch multiplies in FP8."""
    import torchao.float8.float8_ops as ops

    seen: list[tuple[Any, ...]] = []
    multiply = ops.addmm_float8_unwrapped

    def watched(a: Any, a_scale: Any, b: Any, *others: Any, **named: Any) -> Any:
        seen.append((a.dtype, b.dtype, tuple(a.shape), tuple(b.shape)))
        return multiply(a, a_scale, b, *others, **named)

    monkeypatch.setattr(ops, "addmm_float8_unwrapped", watched)
    yield seen


def test_large_linears_multiply_in_fp8_and_weights_stay(
    make_job: MakeJob, products: list[tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under this name bf16 would be believed to be FP8; and what is saved must be what every other step reads."""
    import torch

    from nvila.components.model.nvila import NVILA

    widths, prepare = set(), NVILA.prepare

    def measured(*given: Any, **named: Any) -> Any:
        spliced = prepare(*given, **named)
        widths.add(spliced.attention_mask_BT.numel())
        return spliced

    monkeypatch.setattr(NVILA, "prepare", measured)
    job, plain = make_job("fp8", run=FP8), make_job("bf16", run={"precision": "bf16"})
    train(job, Stop())
    told = json.loads(Path(job.out, "fp8.json").read_text())
    assert (told["backend"], told["scaling"], told["linears"]) == ("torchao", "tensorwise", TAKEN)
    steps = len(losses(job))
    assert steps == 6 and len(products) >= steps * 10 * 3
    forward, gradient = torch.float8_e4m3fn, torch.float8_e5m2
    assert {kinds[:2] for kinds in products} == {(forward, forward), (gradient, forward)}
    assert all(size % 16 == 0 for _, _, *shapes in products for shape in shapes for size in shape)
    assert all(width % 16 == 0 for width in widths)
    products.clear()
    train(plain, Stop())
    assert not products and not Path(plain.out, "fp8.json").exists()
    after = weights(job.out)
    assert {tensor.dtype for tensor in after.values()} == {torch.bfloat16}
    assert after.keys() == weights(plain.out).keys()
    assert losses(job) != losses(plain)
    assert [loss for _, loss in losses(job)] == pytest.approx([loss for _, loss in losses(plain)], rel=0.05)


def test_a_stage_resumes_in_the_middle_as_if_it_had_not_stopped(make_job: MakeJob) -> None:
    """What FP8 keeps beside the weights, if anything, must be in the checkpoint."""
    whole, parted = make_job("whole", run=FP8), make_job("parted", run=FP8)
    train(whole, Stop())
    with pytest.raises(Preempted):
        train(parted, Stop(after=3))
    train(parted, Stop())
    assert losses(parted) == losses(whole)
    one, other = weights(parted.out), weights(whole.out)
    assert all(tensor.equal(other[name]) for name, tensor in one.items())


@pytest.mark.parametrize("zero", [1, 2, 3])
def test_zero_changes_nothing(make_job: MakeJob, zero: int) -> None:
    """Weights that are shared out are gathered for the products, and gradients of these are reduced as any other."""
    alone, shared = make_job("alone", run=FP8), make_job("shared", run=FP8 | {"zero": zero})
    for job in (alone, shared):
        train(job, Stop())
    assert [loss for _, loss in losses(shared)] == pytest.approx([loss for _, loss in losses(alone)], rel=5e-3)
    assert json.loads(Path(shared.out, "fp8.json").read_text())["linears"] == TAKEN


def test_a_stage_in_which_no_linear_is_large_enough_is_refused(make_job: MakeJob) -> None:
    """It would run as bf16 under the name of FP8; before a weight is loaded."""
    with pytest.raises(ConfigError, match=r"no Linear of the decoder .* say 32 or less"):
        train(make_job("none", run={"precision": "fp8-current"}), Stop())


@pytest.mark.parametrize("method", some(["lora", "dora"], 1))
def test_adapters_lie_beside_products_in_fp8(make_job: MakeJob, method: str) -> None:
    """The frozen Linears are the work, and are what FP8 takes; adapters stay in bf16, whatever their rank."""
    stage = {"methods": {"llm": method}, "lora": {"rank": 32}}
    job = make_job(method, stage=stage, run=FP8)
    train(job, Stop())
    told = json.loads(Path(job.out, "fp8.json").read_text())
    assert told["linears"] == {f"{name}.base_layer": number for name, number in TAKEN.items()}
    assert weights(job.out).keys() == weights(job.model).keys()


def test_weights_in_four_bits_leave_nothing_to_fp8(make_job: MakeJob) -> None:
    """The Linears would be multiplied in bf16, under the name of FP8."""
    with pytest.raises(ConfigError, match="no Linear of the decoder is left"):
        train(make_job("qlora", stage={"methods": {"llm": "qlora"}}, run=FP8), Stop())


def test_a_pass_is_told_whether_the_weights_have_changed(make_job: MakeJob, monkeypatch: pytest.MonkeyPatch) -> None:
    """Copies of them in FP8 are kept over the passes of a step: kept longer, a step would be taken from old ones."""
    told: list[bool] = []

    @contextmanager
    def noted(first: bool) -> Iterator[None]:
        told.append(first)
        yield

    about = Fp8Products(backend="none", version="0", scaling="none", linears={})
    monkeypatch.setattr("nvila.components.train.engine.use", lambda model, run: Products(about, noted))
    train(make_job("told", stage={"micro_batch": 2}, run={"precision": "bf16", "packing": "padded"}), Stop())
    assert told == [True, False, False, False] * 6


def test_processes_that_choose_scales_together_go_through_as_many_passes() -> None:
    """Without ZeRO each has as many as its samples need, and who had more would wait for the others for ever."""
    about = Fp8Products(backend="none", version="0", scaling="delayed", linears={})
    plain = SimpleNamespace(world_size=2, zero_optimization_stage=lambda: 0)
    others = iter([True, True, True, False])  # the other process has three passes

    class Two(Engine):
        def total(self, *numbers: float) -> list[float]:
            return [number + next(others) for number in numbers]

    assert list(Two(plain, products=Products(about, meets=True)).together([1], 0)) == [1, 0, 0]
    assert list(Two(plain, products=Products(about)).together([1], 0)) == [1]


@pytest.mark.parametrize("precision", some(["fp8-delayed", "fp8-block"], 1))
def test_what_only_transformer_engine_does_is_refused_without_it(make_job: MakeJob, precision: str) -> None:
    """torchao's scaling under its name would be another experiment."""
    with pytest.raises(ConfigError, match=rf"only Transformer Engine does {precision}, and there is no GPU here"):
        train(make_job("none", run=FP8 | {"precision": precision}), Stop())


@pytest.mark.slow
@pytest.mark.turns(3, 1)
def test_two_processes_train_as_one(make_job: MakeJob) -> None:
    """Each scales its own rows: near to what one does with all of them; from ZeRO 2 on they meet in each pass."""
    alone = make_job("alone", run=FP8)
    jobs = [make_job(f"two-{zero}", run=FP8 | {"zero": zero, "gpus": 2}) for zero in (0, 3)]
    train(alone, Stop())
    matrix.on_ranks(jobs, 2)
    for job in jobs:
        assert [loss for _, loss in losses(job)] == pytest.approx([loss for _, loss in losses(alone)], rel=0.02)
        assert json.loads(Path(job.out, "fp8.json").read_text())["linears"] == TAKEN
