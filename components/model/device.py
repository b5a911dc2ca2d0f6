"""Which device a process computes on: its GPU where it has one, else the CPU; what follows for kernels and forks."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

if TYPE_CHECKING:
    from nvila.components.model.nvila import NVILA


def default_device(rank: int = 0) -> str:
    """`cuda:N` with this process's number on its machine, or `cpu`."""
    return f"cuda:{rank}" if torch.cuda.is_available() else "cpu"


def start_method() -> str:
    """Of `multiprocessing`: a fork has torch and transformers in memory already, but it cannot use CUDA."""
    return "spawn" if torch.cuda.is_available() else "fork"


def use_flash_attention(model: NVILA) -> None:
    """Attention by flash-attn where that package is installed and can work: on CUDA, in half precision."""
    from transformers.utils import is_flash_attn_2_available

    weight = model.llm.get_input_embeddings().weight
    half = weight.dtype in (torch.float16, torch.bfloat16)
    if weight.device.type == "cuda" and half and is_flash_attn_2_available():
        for part in (model.vision_tower, model.llm):
            part.set_attn_implementation("flash_attention_2")


class _Linear(nn.Linear):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if input.dtype != torch.bfloat16:
            return super().forward(input)
        bias = None if self.bias is None else self.bias.float()
        return nn.functional.linear(input.float(), self.weight.float(), bias).bfloat16()


class _Conv2d(nn.Conv2d):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if input.dtype != torch.bfloat16:
            return super().forward(input)
        bias = None if self.bias is None else self.bias.float()
        return self._conv_forward(input.float(), self.weight.float(), bias).bfloat16()


def use_float32_products(model: nn.Module) -> None:
    """Products of bfloat16 layers in float32, rounded at their end, on a CPU that has none in bfloat16.

    torch has them there as well, ten times slower than float32's; either adds up in float32.
    """
    on_gpu = any(parameter.is_cuda for parameter in model.parameters())
    if on_gpu or torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return
    for module in model.modules():
        if type(module) is nn.Linear:
            module.__class__ = _Linear
        elif type(module) is nn.Conv2d:
            module.__class__ = _Conv2d
