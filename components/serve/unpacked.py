"""W4A16 in vLLM on a CPU without AVX-512, for which vLLM has no kernel: the weights are unpacked when they are loaded.

They are those of the checkpoint, and take four times the memory. Everywhere else vLLM's own kernels are used.
"""

from __future__ import annotations

import torch
from torch.nn import Parameter, functional
from vllm.model_executor.kernels.linear import _POSSIBLE_KERNELS, CPUWNA16LinearKernel
from vllm.model_executor.kernels.linear.mixed_precision.MPLinearKernel import MPLinearLayerConfig
from vllm.model_executor.layers.quantization.utils.quant_utils import unpack_quantized_values_into_int32
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


def register_unpacked() -> None:
    """Have vLLM look at this kernel first; safe to call again."""
    kernels = _POSSIBLE_KERNELS[PlatformEnum.CPU]
    if UnpackedLinearKernel not in kernels:
        kernels.insert(0, UnpackedLinearKernel)
