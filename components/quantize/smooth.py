"""SmoothQuant for the vision tower: moves activation outliers into the weights, changing no output (arXiv 2211.10438).

Only LayerNorm -> q, k, v and LayerNorm -> fc1, as in llm-awq's deployment of NVILA; out_proj and fc2 stay as they are.
The activation scale is max|x| over the calibration tiles.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from nvila.components.model.nvila import NVILA

LEAST = 1e-5


@torch.no_grad()
def smooth_tower(model: NVILA, tiles: Sequence[torch.Tensor], alpha: float) -> None:
    """Fold scales into the tower's LayerNorms and the Linears behind them, in place.

    Args:
        model: its tower is changed.
        tiles: calibration batches (T, 3, S, S), normalised.
        alpha: migration strength in [0, 1]; the larger, the smoother the activations.
    """
    from nvila.components.model.vision.tower import tower_features, used_blocks

    blocks = model.vision_tower.encoder.layers
    blocks = blocks[: used_blocks(len(blocks), model.config.select_layer)]
    pairs: list[tuple[Any, list[Any]]] = []
    for block in blocks:
        attention = block.self_attn
        pairs.append((block.layer_norm1, [attention.q_proj, attention.k_proj, attention.v_proj]))
        pairs.append((block.layer_norm2, [block.mlp.fc1]))
    largest = _largest_outputs(
        [norm for norm, _ in pairs],
        lambda: [tower_features(model.vision_tower, batch, model.config.select_layer) for batch in tiles],
    )
    for norm, followers in pairs:
        _fold(norm, followers, largest[norm], alpha)


def _largest_outputs(norms: Sequence[nn.Module], run: Callable[[], Any]) -> dict[nn.Module, torch.Tensor]:
    """max|output| per channel of each module while `run` runs."""
    largest: dict[nn.Module, torch.Tensor] = {}

    def observe(module: nn.Module, _: Any, output: torch.Tensor) -> None:
        seen = output.abs().flatten(0, -2).amax(0)
        largest[module] = torch.maximum(largest[module], seen) if module in largest else seen

    hooks = [norm.register_forward_hook(observe) for norm in norms]
    try:
        run()
    finally:
        for hook in hooks:
            hook.remove()
    return largest


def _fold(norm: Any, followers: Sequence[Any], activation: torch.Tensor, alpha: float) -> None:
    """s = activation^alpha / weight^(1 - alpha) per channel, the weight's maximum taken over all followers."""
    weight = torch.stack([follower.weight.abs().amax(0) for follower in followers]).amax(0)
    scale = (activation.float().pow(alpha) / weight.float().clamp(min=LEAST).pow(1 - alpha)).clamp(min=LEAST)
    scale = scale.to(norm.weight.dtype)
    norm.weight /= scale
    norm.bias /= scale
    for follower in followers:
        follower.weight *= scale
