"""Which device a process computes on: its GPU where it has one, else the CPU; what follows for attention and forks."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

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
