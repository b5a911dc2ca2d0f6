"""Which device a process computes on: its GPU where it has one, else the CPU; what follows for kernels and forks."""

from __future__ import annotations

from inspect import signature
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from nvila.components.model.nvila import NVILA


VARLEN = "varlen"
"""What `set_attn_implementation` calls torch's attention over samples of one row."""


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


def use_packed_attention(model: NVILA) -> bool:
    """Attention of the decoder by a kernel that knows where the samples of a row begin: flash-attn's, or torch's own on
    CUDA in half precision.

    Returns:
        Whether there is one. All samples of a pass lie in one row then.
    """
    weight = model.llm.get_input_embeddings().weight
    if weight.device.type != "cuda" or weight.dtype not in (torch.float16, torch.bfloat16):
        return False
    if model.llm.config._attn_implementation != "flash_attention_2":
        from transformers import AttentionInterface

        AttentionInterface.register(VARLEN, _varlen)
        model.llm.set_attn_implementation(VARLEN)
    return True


def kernel_arguments(attention: str, lengths_S: torch.Tensor | None) -> dict[str, Any]:
    """What such a kernel is told of a row with samples of these lengths; nothing where another attends."""
    if lengths_S is None or attention not in (VARLEN, "flash_attention_2"):
        return {}
    begins = nn.functional.pad(lengths_S.cumsum(0), (1, 0)).to(torch.int32)
    longest = int(lengths_S.max())
    return {
        "cu_seq_lens_q": begins,
        "cu_seq_lens_k": begins,
        "max_length_q": longest,
        "max_length_k": longest,
    }


def _varlen(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    *,
    cu_seq_lens_q: torch.Tensor,
    max_length_q: int,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Of (1, heads, T, size) queries, and keys and values with as many heads or fewer: (1, T, heads, size)."""
    from torch.nn.attention.varlen import varlen_attn

    options: dict[str, Any] = {}
    groups = query.shape[1] // key.shape[1]
    if groups > 1 and "enable_gqa" in signature(varlen_attn).parameters:
        options["enable_gqa"] = True
    elif groups > 1:  # of an older torch, such as an image's own
        key, value = (heads.repeat_interleave(groups, dim=1) for heads in (key, value))
    attended: Any = varlen_attn(
        query[0].transpose(0, 1),
        key[0].transpose(0, 1),
        value[0].transpose(0, 1),
        cu_seq_lens_q,
        cu_seq_lens_q,
        max_length_q,
        max_length_q,
        scale=scaling,
        window_size=(-1, 0),
        **options,
    )
    return attended[None], None


FEW_ROWS = 32
"""Below it a product takes less time than its weights' way to float32: a decoder that answers has one row."""


class _Linear(nn.Linear):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if input.dtype != torch.bfloat16 or input.numel() < FEW_ROWS * self.in_features:
            return super().forward(input)
        bias = None if self.bias is None else self.bias.float()
        return nn.functional.linear(input.float(), self.weight.float(), bias).bfloat16()


def is_plain_linear(module: nn.Module) -> bool:
    """Whether it is a Linear of floating-point weights and nothing else: other libraries' quantized ones are theirs."""
    return type(module) in (nn.Linear, _Linear)


class _Conv2d(nn.Conv2d):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if input.dtype != torch.bfloat16:
            return super().forward(input)
        bias = None if self.bias is None else self.bias.float()
        return self._conv_forward(input.float(), self.weight.float(), bias).bfloat16()


def _has_bfloat16_products() -> bool:
    """Whether the CPU multiplies bfloat16 matrices itself. torch does on any, many times slower than float32's; either
    adds up in float32.

    oneDNN says so of every CPU with AVX-512, and takes five times as long as in float32 where that is all there is.
    """
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return False
    can = torch.cpu.get_capabilities()
    return can.get("architecture") != "x86_64" or any(can.get(name) for name in ("avx512_bf16", "amx_bf16"))


def product_dtype(weights: torch.dtype, device: torch.device) -> torch.dtype:
    """In which type matrices of this one are multiplied on a device."""
    wide = device.type == "cpu" and weights == torch.bfloat16 and not _has_bfloat16_products()
    return torch.float32 if wide else weights


def use_float32_products(model: nn.Module) -> None:
    """Products of bfloat16 layers in float32, rounded at their end, on a CPU that has none in bfloat16."""
    on_gpu = any(parameter.is_cuda for parameter in model.parameters())
    if on_gpu or _has_bfloat16_products():
        return
    for module in model.modules():
        if type(module) is nn.Linear:
            module.__class__ = _Linear
        elif type(module) is nn.Conv2d:
            module.__class__ = _Conv2d


def plain_attention() -> str:
    """What `set_attn_implementation` calls attention in plain matrix products on this CPU: transformers' `eager`, or
    the same with both products in float32, rounded at their end, where there are none in bfloat16."""
    if _has_bfloat16_products():
        return "eager"
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import eager_mask

    name = "float32_products"
    AttentionInterface.register(name, _attention)
    AttentionMaskInterface.register(name, eager_mask)
    return name


def _attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **_: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Of (B, heads, T, size) queries, and keys and values with as many heads or fewer: (B, T, heads, size), weights."""
    groups = query.shape[1] // key.shape[1]
    keys, values = (heads.float().repeat_interleave(groups, dim=1) for heads in (key, value))
    weights = (query.float() @ keys.transpose(2, 3)).to(query.dtype) * scaling
    if attention_mask is not None:
        weights = weights + attention_mask
    weights = nn.functional.softmax(weights, dim=-1, dtype=torch.float32).to(query.dtype)
    weights = nn.functional.dropout(weights, p=dropout, training=module.training)
    return (weights.float() @ values).to(query.dtype).transpose(1, 2).contiguous(), weights
