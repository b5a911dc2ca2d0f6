"""`nvila fp8 doctor`: what FP8 would gain, and what it would not."""

from __future__ import annotations

import json
from typing import Any

import pytest
from typer.testing import CliRunner

from nvila.components.contracts.errors import ConfigError
from nvila.components.contracts.gpus import GPUS
from nvila.pipelines.cli import app
from nvila.pipelines.planning import doctor, timing
from nvila.pipelines.planning.layers import Layer, Product
from nvila.pipelines.planning.timing import bound

H100 = GPUS["h100"]
BLOCK = "llm.model.layers.*."


@pytest.fixture(scope="module")
def large() -> doctor.Diagnosis:
    """Of a recipe of a size that FP8 is for, on a machine without a GPU."""
    return doctor.diagnose("nvila-8b", [], "h100")


def test_a_7b_without_a_gpu_gets_a_bound_that_says_so(large: doctor.Diagnosis) -> None:
    """A number from a data sheet that looks like a measurement would be planned with."""
    assert large.how == "bound for h100, not measured: there is no GPU here"
    by_step = {one.step: one for one in large.stages}
    whole = by_step["train-4"]
    taken = {layer.name.removeprefix(BLOCK) for layer in whole.layers if layer.stays is None}
    assert taken == {"self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"}
    why = {layer.name: layer.stays for layer in whole.layers}
    assert why[f"{BLOCK}self_attn.k_proj"] == "512 features, below min_features 3584"
    assert why["llm.lm_head"] == why["mm_projector.layers.2"] == "outside the decoder's blocks"
    assert all(1 < one.gain < 2 and 0.5 < one.share < 0.9 for one in large.stages)
    assert all(set(one.micro_batch) == {"bf16", "fp8-current"} for one in large.stages)


def test_its_linears_are_nearly_all_of_the_work(large: doctor.Diagnosis) -> None:
    """A share of another whole than the one that the Linears are of would be no share."""
    for one in large.stages:
        counted = sum(layer.operations for layer in one.layers)
        taken = sum(layer.operations for layer in one.layers if layer.stays is None)
        assert 0.8 < one.share / (taken / counted) <= 1


def test_where_a_part_is_frozen_its_weights_are_not_multiplied_for(large: doctor.Diagnosis) -> None:
    """Stage 1 has no weight gradient in the decoder, and no backward pass in the tower."""
    first = {layer.name: [product.kind for product in layer.products] for layer in large.stages[0].layers}
    assert first["vision_tower.encoder.layers.*.mlp.fc1"] == ["forward"]
    assert first[f"{BLOCK}mlp.up_proj"] == ["forward", "input gradient"]
    lora = ["train.stages.train-4.methods.llm=lora", "train.stages.train-4.lora.rank=64"]
    tuned = doctor.diagnose("nvila-8b", lora, "h200").stages[3]
    kinds = {layer.name: [product.kind for product in layer.products] for layer in tuned.layers}
    assert kinds[f"{BLOCK}mlp.up_proj"] == ["forward", "input gradient"]


def test_the_bound_is_the_longer_one_of_multiplying_and_moving() -> None:
    """Small products wait for memory: FP8 gains less than twice, and with its casts may lose."""
    wide, narrow = (
        Layer("x", 1, (out, 4096), 8192, (Product("forward", 8192, 4096, out),), None) for out in (16384, 64)
    )
    fast, slow = bound(wide, H100), bound(narrow, H100)
    assert fast.products["forward"].gain == pytest.approx(1979 / 989)
    moved = {size: size * (8192 * 4096 + 4096 * 64) + 2 * 8192 * 64 for size in (1, 2)}
    assert slow.products["forward"].bf16 == pytest.approx(moved[2] / 3.35e12)
    assert slow.products["forward"].fp8 == pytest.approx(moved[1] / 3.35e12)
    casts = 3 * (8192 * 4096 + 4096 * 64)
    assert slow.layer.fp8 == pytest.approx((moved[1] + casts) / 3.35e12) and slow.layer.gain < 1


def test_a_small_recipe_is_measured_here_and_told_as_that(monkeypatch: pytest.MonkeyPatch) -> None:
    """Times of a CPU must not be taken for a GPU's."""
    monkeypatch.setattr(timing, "MOST_ON_A_CPU", 64)
    ran = CliRunner().invoke(app, ["fp8", "doctor", "micro", "--json"])
    assert ran.exit_code == 0, ran.output
    told: dict[str, Any] = json.loads(ran.stdout)
    assert told["how"].startswith("measured on this CPU") and "nothing about a GPU" in told["how"]
    assert told["precision"] == "fp8-current"
    for stage in told["stages"]:
        assert all(one["layer"]["fp8"] > 0 for one in stage["times"] if one)
        assert 0 < stage["share"] < 1 and stage["gain"] > 0


def test_a_recipe_that_fp8_does_nothing_for_is_told_so() -> None:
    """A 2B has no Linear of 3584 features."""
    ran = CliRunner().invoke(app, ["fp8", "doctor", "nvila-lite-2b"])
    assert ran.exit_code == 0 and "FP8 takes no Linear here: a run would be refused" in ran.stdout
    with pytest.raises(ConfigError, match="--gpu"):
        doctor.diagnose("nvila-lite-2b", [], "a100")
