"""The projectors between tower and decoder, with the reference's state-dict names; spec section 1.2."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from nvila.components.contracts.errors import ConfigError

DOWNSAMPLE = {
    "linear": 1,
    "mlp2x_gelu": 1,
    "mlp_downsample": 2,
    "mlp_downsample_2x2_fix": 2,
    "mlp_downsample_3x3_fix": 3,
}
"""Side of the space-to-channel cell of each projector."""


class Projector(nn.Module):
    """(B, N, D) tower features to (B, ceil(sqrt(N) / downsample) ** 2, H) decoder embeddings."""

    def __init__(self, layers: nn.Sequential, downsample: int) -> None:
        super().__init__()
        self.layers = layers
        self.downsample = downsample

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Project (B, N, D) features."""
        return self.layers(features)


class SpaceToChannel(nn.Module):
    """Fold k x k features into channels, row by row in the cell, with zeros at the bottom and right where needed."""

    def __init__(self, k: int) -> None:
        super().__init__()
        self.k = k

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """(B, s * s, C) to (B, ceil(s / k) ** 2, k * k * C)."""
        b, n, c = features.shape
        k, side = self.k, round(n**0.5)
        pad = -side % k
        square = F.pad(features.view(b, side, side, c), (0, 0, 0, pad, 0, pad))
        cells = (side + pad) // k
        folded = square.view(b, cells, k, cells, k, c).permute(0, 1, 3, 2, 4, 5)
        return folded.reshape(b, cells * cells, k * k * c)


def build_projector(kind: str, mm_hidden: int, llm_hidden: int) -> Projector:
    """A projector by the reference's name.

    Raises:
        ConfigError: no such projector.
    """
    d, h = mm_hidden, llm_hidden
    if kind not in DOWNSAMPLE:
        raise ConfigError("unknown projector", where="projector", value=kind, do=f"Use one of {', '.join(DOWNSAMPLE)}")
    layers: list[nn.Module]
    if kind == "linear":
        layers = [nn.Linear(d, h)]
    elif kind == "mlp2x_gelu":
        layers = [nn.Linear(d, h), nn.GELU(), nn.Linear(h, h)]
    elif kind == "mlp_downsample_3x3_fix":
        layers = [SpaceToChannel(3), nn.LayerNorm(9 * d), nn.Linear(9 * d, 3 * d), nn.GELU()]
        layers += [nn.LayerNorm(3 * d), nn.Linear(3 * d, h), nn.GELU(), nn.Linear(h, h)]
    else:
        layers = [SpaceToChannel(2), nn.LayerNorm(4 * d), nn.Linear(4 * d, h), nn.GELU(), nn.Linear(h, h)]
    return Projector(nn.Sequential(*layers), DOWNSAMPLE[kind])
