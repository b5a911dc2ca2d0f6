"""The vision tower of the vLLM model: vLLM's SigLIP with an MLP that can be quantized at any width.

vLLM's own SigLIP leaves the MLP unquantized unless its widths are multiples of 64, which holds neither for the tower
of NVILA (4304) nor for a tiny one; a W8A8 checkpoint would then not load. Only that part is replaced.
"""

from __future__ import annotations

import torch
from torch import nn
from transformers import SiglipVisionConfig
from vllm.model_executor.layers.activation import get_act_fn
from vllm.model_executor.layers.linear import ColumnParallelLinear, RowParallelLinear
from vllm.model_executor.layers.quantization import QuantizationConfig
from vllm.model_executor.models.siglip import SiglipVisionModel


def build_tower(
    config: SiglipVisionConfig, select_layer: int, quant_config: QuantizationConfig | None, prefix: str
) -> SiglipVisionModel:
    """The tower up to the block whose output is the feature, without post_layernorm and head.

    Args:
        config: sizes of the whole tower.
        select_layer: index into the hidden states [embeddings, block 1, ..., block L].
        quant_config: what vLLM read from the checkpoint; None for plain weights.
        prefix: name of the tower inside the model; quantization targets are written against it.
    """
    blocks = select_layer if select_layer >= 0 else config.num_hidden_layers + 1 + select_layer
    tower = SiglipVisionModel(
        config,
        quant_config=quant_config,
        num_hidden_layers_override=blocks,
        require_post_norm=False,
        prefix=prefix,
        use_head=False,
    )
    for index, layer in enumerate(tower.vision_model.encoder.layers):
        layer.mlp = TowerMLP(config, quant_config, f"{prefix}.vision_model.encoder.layers.{index}.mlp")
    return tower


class TowerMLP(nn.Module):
    """Linear, GELU, Linear, split over tensor-parallel ranks."""

    def __init__(self, config: SiglipVisionConfig, quant_config: QuantizationConfig | None, prefix: str) -> None:
        super().__init__()
        hidden, inner = config.hidden_size, config.intermediate_size
        self.activation = get_act_fn(config.hidden_act)
        self.fc1 = ColumnParallelLinear(hidden, inner, quant_config=quant_config, prefix=f"{prefix}.fc1")
        self.fc2 = RowParallelLinear(inner, hidden, quant_config=quant_config, prefix=f"{prefix}.fc2")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(T, N, C) -> (T, N, C)."""
        x, _ = self.fc1(x)
        x, _ = self.fc2(self.activation(x))
        return x
