"""Which modules FP8 takes of a model, and what torchao's keep between the passes."""

from __future__ import annotations

import weakref

import numpy as np
import pytest
import torch
from torch import nn

from nvila.components.contracts.errors import ConfigError
from nvila.components.contracts.recipe.train import Fp8, Run
from nvila.components.precision import by_torchao
from nvila.components.precision.backends import backend
from nvila.components.precision.linears import compactly, eligible


class FourBit(nn.Linear):
    """Stands for a Linear whose weights another library has quantized."""


def test_adapters_and_quantized_weights_are_left_alone() -> None:
    """An adapter of rank 64 would lose what it learns; weights in four bits are no floats that could be cast."""
    tree = {
        "llm.model.layers.0.mlp.up_proj": nn.Linear(128, 128),
        "llm.model.layers.1.mlp.up_proj.base_layer": nn.Linear(128, 128),
        "llm.model.layers.1.mlp.up_proj.lora_A.default": nn.Linear(128, 128),
        "llm.model.layers.2.mlp.up_proj": FourBit(128, 128),
        "llm.model.layers.3.mlp.up_proj": nn.Linear(128, 120),
        "llm.lm_head": nn.Linear(128, 512),
        "mm_projector.layers.1": nn.Linear(128, 128),
        "vision_tower.encoder.layers.0.mlp.fc1": nn.Linear(128, 128),
    }
    model = nn.Module()
    for name, module in tree.items():
        *folders, last = name.split(".")
        at = model
        for folder in folders:
            if not hasattr(at, folder):
                at.add_module(folder, nn.Module())
            at = getattr(at, folder)
        at.add_module(last, module)
    assert list(eligible(model, 128)) == list(tree)[:2]
    assert compactly(["llm.model.layers.0.a", "llm.model.layers.10.a", "llm.model.layers.1.b"]) == {
        "llm.model.layers.*.a": 2,
        "llm.model.layers.*.b": 1,
    }


def test_a_weight_that_is_shared_out_is_not_kept_until_the_backward_pass() -> None:
    """ZeRO 3 drops what it gathered after each module: a view of it would keep the whole model on every GPU."""
    torch.manual_seed(0)
    values, given = torch.randn(32, 48).bfloat16(), torch.randn(16, 48).bfloat16().requires_grad_()
    gradients = []
    for zero in (0, 3):
        model = nn.Sequential(nn.Linear(48, 32, bias=False, dtype=torch.bfloat16))
        run = Run(precision="fp8-current", zero=zero, fp8=Fp8(min_features=32))
        by_torchao.use(model, {"0": model[0]}, run, {})
        weight, gathered = model[0].weight, np.zeros((32, 48), np.int16)
        weight.data = torch.from_numpy(gathered).view(torch.bfloat16).copy_(values)
        alive = weakref.ref(gathered)
        del gathered
        out = model(given).square().sum()
        weight.data = torch.empty(0, dtype=torch.bfloat16)
        assert (alive() is None) == (zero == 3)
        padded = torch.zeros(100 + values.numel(), dtype=torch.bfloat16)
        weight.data = padded[100:].view(32, 48).copy_(values)  # gathered anew, elsewhere in a larger buffer
        out.backward()
        gradients.append((given.grad.clone(), weight.grad.clone()))  # type: ignore[union-attr]
        given.grad = None
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))


def test_the_backend_is_the_machine_s(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there is a GPU without FP8, or no Transformer Engine, it is said before anything long starts."""
    current, rowwise = (Run(precision="fp8-current", fp8=Fp8(scaling=scaling)) for scaling in ("tensorwise", "rowwise"))
    assert backend(current) == "torchao"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA A100")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    with pytest.raises(ConfigError, match="NVIDIA A100 has no products in FP8"):
        backend(current)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    with pytest.raises(ConfigError, match=r"Transformer Engine is not installed here .* image `train`"):
        backend(Run(precision="fp8-block"))
    monkeypatch.setattr("nvila.components.precision.backends.find_spec", lambda name: name)
    assert backend(Run(precision="fp8-block")) == backend(current) == "transformer-engine"
    assert backend(rowwise) == "torchao"
