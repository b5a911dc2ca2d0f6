"""Products of bfloat16 layers on a CPU that has none."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from nvila.components.model.device import FEW_ROWS, plain_attention, use_float32_products


def layers() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 4, stride=4), nn.Flatten(2), nn.Linear(16, 12, bias=False)).bfloat16()


def of_cpu(monkeypatch: pytest.MonkeyPatch, *capabilities: str) -> None:
    """Have torch see an x86 CPU that oneDNN believes to know bfloat16."""
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: True)
    found = {"architecture": "x86_64"} | dict.fromkeys(capabilities, True)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: found)


def test_products_in_float32_are_those_of_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stage took ten times as long on a CPU without AVX-512, four times with it alone; what it computes must stay."""
    of_cpu(monkeypatch, "avx512_f")
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
    of_cpu(monkeypatch, "amx_bf16", "avx512_f")
    model = layers()
    use_float32_products(model)
    assert type(model[0]) is nn.Conv2d and type(model[2]) is nn.Linear


def test_a_cpu_that_has_only_avx512_multiplies_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """A product of bfloat16 took five times as long there, though oneDNN calls the CPU able."""
    of_cpu(monkeypatch, "avx512_f")
    model = layers()
    use_float32_products(model)
    assert type(model[0]) is not nn.Conv2d and plain_attention() != "eager"


def decoder(attention: str) -> Any:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    model: Any = Qwen2ForCausalLM(Qwen2Config(vocab_size=60, num_hidden_layers=2, **sizes)).bfloat16().train()
    model.set_attn_implementation(attention)
    return model


def tower(attention: str) -> Any:
    from transformers import SiglipVisionConfig, SiglipVisionModel

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "image_size": 28, "patch_size": 14}
    model: Any = SiglipVisionModel(SiglipVisionConfig(num_hidden_layers=2, **sizes)).bfloat16().train()
    model.set_attn_implementation(attention)
    return model


def test_attention_in_float32_products_is_eager_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention took half of a training step on such a CPU; a mask that is lost on the way would show the future."""
    of_cpu(monkeypatch, "avx512_f")
    name = plain_attention()
    assert name != "eager"
    ids, mask = torch.randint(0, 60, (3, 9)), torch.ones(3, 9, dtype=torch.long)
    mask[1, 6:] = 0
    pixels = torch.randn(2, 3, 28, 28).bfloat16()
    for make, given in ((decoder, {"input_ids": ids, "attention_mask": mask}), (tower, {"pixel_values": pixels})):
        ours, plain = make(name), make("eager")
        found, wanted = (model(**given)[0].float() for model in (ours, plain))
        torch.testing.assert_close(found, wanted, rtol=2**-5, atol=2**-5)
        for one in (found, wanted):
            one.pow(2).sum().backward()
        for mine, theirs in zip(ours.parameters(), plain.parameters(), strict=True):
            if theirs.grad is not None:
                torch.testing.assert_close(
                    mine.grad, theirs.grad, rtol=2**-3, atol=2**-3 * theirs.grad.abs().max().item()
                )


def test_attention_of_a_cpu_with_bfloat16_is_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Numbers of the demonstration are those of the machines that it was measured on."""
    of_cpu(monkeypatch, "amx_bf16", "avx512_f")
    assert plain_attention() == "eager"


@pytest.mark.parametrize("rows", [1, FEW_ROWS])
def test_an_answer_does_not_bring_all_weights_to_float32(monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    """A decoder of one row a step spent nine tenths of it there."""
    of_cpu(monkeypatch, "avx512_f")
    model = nn.Sequential(nn.Linear(16, 12)).bfloat16()
    use_float32_products(model)
    seen: list[torch.dtype] = []
    linear = nn.functional.linear
    monkeypatch.setattr(nn.functional, "linear", lambda x, *more: seen.append(x.dtype) or linear(x, *more))
    assert model(torch.randn(rows, 16).bfloat16()).dtype == torch.bfloat16
    assert seen == [torch.bfloat16 if rows == 1 else torch.float32]
