"""The projectors between tower and decoder, with the reference's state-dict names (`base_projector.py`)."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import nn
from torch.nn import functional as F

from nvila.components.contracts.errors import ConfigError
from nvila.components.contracts.projectors import Projection, projection
from nvila.components.model.vision.resampler import Perceiver, TokenLearner

MODULES: dict[str, type[nn.Module]] = {"token_learner": TokenLearner, "perceiver": Perceiver}
"""By the resampler's name."""


def projected_side(kind: str, side: int) -> int:
    """Side of the square of tokens that becomes of a square of features.

    Raises:
        ConfigError: no such projector.
    """
    return _read(kind).side(side)


class Projector(nn.Module):
    """(B, N, D) tower features to (B, projected_side ** 2, H) decoder embeddings."""

    def __init__(self, layers: nn.Module, downsample: int) -> None:
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

    The reference leaves the attribute `downsample` of the two `3x3_s2` kinds at 1; here it says what they do, 3.

    Raises:
        ConfigError: no such projector, or an identity between different widths.
    """
    d, h, named = mm_hidden, llm_hidden, _read(kind)
    k = named.cell
    if kind == "identity" and d != h:
        raise ConfigError(
            f"the identity cannot turn {d} channels into {h}", where="projector", value=kind, do="Use linear"
        )
    layers: list[nn.Module]
    if named.resampler:
        layers = [MODULES[named.resampler](d, named.tokens), nn.Linear(d, h), nn.GELU(), nn.Linear(h, h)]
    elif named.linears:
        layers = [nn.Linear(d, h)]
        for _ in range(named.linears - 1):
            layers += [nn.GELU(), nn.Linear(h, h)]
    elif kind == "linear":
        return Projector(nn.Linear(d, h), k)  # `layers.weight` in the reference's files, without a number
    elif kind == "identity":
        layers = []
    else:
        layers = _downsampling(k, _widths(kind, d, h))
    return Projector(nn.Sequential(*layers), k)


def _read(kind: str) -> Projection:
    try:
        return projection(kind)
    except ValueError as error:
        raise ConfigError(str(error), where="projector", value=kind) from None


def _widths(kind: str, d: int, h: int) -> list[int]:
    """Channels from the folded cell to the decoder."""
    if kind == "mlp_downsample_3x3_fix":
        return [9 * d, 3 * d, h]
    if kind == "mlp_downsample_3x3_s2":
        return [9 * d, 3 * d, d, d // 3, h]
    if kind == "mlp_downsample_3x3_s2_new":
        return [9 * d, 4 * d, 2 * d, d, d // 3, h]
    return [4 * d, h]


def _downsampling(k: int, widths: list[int]) -> list[nn.Module]:
    """Fold, then norm, Linear and GELU from each width to the next, then a last Linear."""
    layers: list[nn.Module] = [SpaceToChannel(k)]
    for a, b in pairwise(widths):
        layers += [nn.LayerNorm(a), nn.Linear(a, b), nn.GELU()]
    return [*layers, nn.Linear(widths[-1], widths[-1])]
