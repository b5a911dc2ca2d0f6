"""Quantized layers in vLLM on older CPUs: the weights are those of the checkpoint, unpacked when they are loaded.

Without AVX-512 vLLM has no kernel for W4A16, and its first request ends the engine. Without VNNI its products of 8-bit
numbers are added up in 16 bits and saturate without a word: two of five answers of a small model were others. Unpacked
weights take four times the memory; where vLLM's own kernels are right, they are used.
"""

from __future__ import annotations

import torch
from torch.nn import Parameter, functional
from vllm.model_executor.kernels.linear import (
    _POSSIBLE_INT8_KERNELS,
    _POSSIBLE_KERNELS,
    CPUInt8ScaledMMLinearKernel,
    CPUWNA16LinearKernel,
)
from vllm.model_executor.kernels.linear.mixed_precision.MPLinearKernel import MPLinearLayerConfig
from vllm.model_executor.kernels.linear.scaled_mm.ScaledMMLinearKernel import Int8ScaledMMLinearLayerConfig
from vllm.model_executor.layers.quantization.utils.quant_utils import unpack_quantized_values_into_int32
from vllm.model_executor.layers.quantization.utils.w8a8_utils import convert_to_channelwise
from vllm.platforms.interface import PlatformEnum


class UnpackedLinearKernel(CPUWNA16LinearKernel):  # type: ignore[misc]
    """Multiplies by (q - bias) * scale in the precision of the activations."""

    @classmethod
    def can_implement(cls, c: MPLinearLayerConfig) -> tuple[bool, str | None]:
        """Where vLLM's kernel would, had it been compiled; of symmetric weights."""
        if hasattr(torch.ops._C, "cpu_gemm_wna16"):
            return False, "vLLM's own kernel is there"
        if c.zero_points:
            return False, "weights with zero points are not unpacked"
        return super().can_implement(c)  # type: ignore[no-any-return]

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        """(out, in / 8) packed and (out, groups) scales become (out, in) weights."""
        packed, scales = (getattr(layer, name) for name in (self.w_q_name, self.w_s_name))
        kind = self.config.weight_type
        whole = unpack_quantized_values_into_int32(packed.data, kind, packed.packed_dim)
        weights = whole if packed.input_dim == 1 else whole.t()
        by_group = scales.data if scales.output_dim == 0 else scales.data.t()
        each = by_group.float().repeat_interleave(weights.shape[1] // by_group.shape[1], dim=1)
        made = ((weights - kind.bias).float() * each).to(self.config.act_type)
        setattr(layer, self.w_q_name, Parameter(made.contiguous(), requires_grad=False))

    def apply_weights(self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """(..., in) -> (..., out)."""
        return functional.linear(x, getattr(layer, self.w_q_name), bias)


class ExactInt8LinearKernel(CPUInt8ScaledMMLinearKernel):  # type: ignore[misc]
    """W8A8 with a scale for each row of activations, added up in float32."""

    @classmethod
    def is_supported(cls, compute_capability: int | None = None) -> tuple[bool, str | None]:
        """On CPUs that vLLM's kernel is wrong on."""
        if torch.cpu._is_vnni_supported():
            return False, "vLLM's own kernel is exact here"
        return super().is_supported(compute_capability)  # type: ignore[no-any-return]

    @classmethod
    def can_implement(cls, c: Int8ScaledMMLinearLayerConfig) -> tuple[bool, str | None]:
        """Activations that are scaled as they come, around zero."""
        return c.input_symmetric and not c.is_static_input_scheme, "activations are scaled beforehand"

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        """(out, in) 8-bit weights become float32; their scales (out, 1)."""
        weight_name, scale_name, *_ = self.layer_param_names
        scale = getattr(layer, scale_name).data
        if not self.config.is_channelwise:
            scale = convert_to_channelwise(scale, layer.logical_widths)
        setattr(layer, scale_name, Parameter(scale.float().reshape(-1), requires_grad=False))
        setattr(layer, weight_name, Parameter(getattr(layer, weight_name).data.float(), requires_grad=False))

    def apply_weights(self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """(..., in) -> (..., out)."""
        weight_name, scale_name, *_ = self.layer_param_names
        scale = x.float().abs().amax(-1, keepdim=True).clamp(min=1e-10) / 127
        rounded = (x.float() / scale).round()
        product = functional.linear(rounded, getattr(layer, weight_name)) * scale * getattr(layer, scale_name)
        return (product if bias is None else product + bias).to(x.dtype)


def register_unpacked() -> None:
    """Have vLLM look at these kernels first; safe to call again."""
    for known, ours in ((_POSSIBLE_KERNELS, UnpackedLinearKernel), (_POSSIBLE_INT8_KERNELS, ExactInt8LinearKernel)):
        kernels = known[PlatformEnum.CPU]
        if ours not in kernels:
            kernels.insert(0, ours)
