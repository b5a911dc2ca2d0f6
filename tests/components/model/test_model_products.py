"""Products of bfloat16 layers on a CPU that has none."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from nvila.components.model.device import use_float32_products


def layers() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 4, stride=4), nn.Flatten(2), nn.Linear(16, 12, bias=False)).bfloat16()


def test_products_in_float32_are_those_of_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stage took ten times as long on a CPU without AVX-512; what it computes, and its names, must stay."""
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    plain = layers()
    model = copy.deepcopy(plain)
    use_float32_products(model)
    model = copy.deepcopy(model)  # as references of pruning are
    assert model.state_dict().keys() == plain.state_dict().keys()
    pixels = torch.randn(2, 3, 16, 16).bfloat16()
    found, wanted = model(pixels), plain(pixels)
    assert found.dtype == torch.bfloat16 and type(model[0]) is not nn.Conv2d and type(model[2]) is not nn.Linear
    torch.testing.assert_close(found, wanted, rtol=2**-6, atol=2**-6)
    for one in (found, wanted):
        one.float().pow(2).sum().backward()
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        assert ours.grad is not None and theirs.grad is not None and ours.grad.dtype == torch.bfloat16
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=2**-4, atol=0.25)
    assert model.float()(pixels.float()).dtype == torch.float32


def test_a_cpu_with_bfloat16_keeps_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Numbers of the demonstration are those of the machines that it was measured on."""
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: True)
    model = layers()
    use_float32_products(model)
    assert type(model[0]) is nn.Conv2d and type(model[2]) is nn.Linear
