"""The learnt compressions that the paper compares with space-to-channel (table 1): TokenLearner and Perceiver.

Not part of any published NVILA: the paper names the modules and their 121 tokens a tile, the sizes inside are ours.
"""

from __future__ import annotations

import torch
from torch import nn

DEPTH = 2
"""Blocks of the Perceiver resampler."""
HEAD_CHANNELS = 64
"""Wanted channels of an attention head; the nearest number of heads that divides the width is taken."""


class TokenLearner(nn.Module):
    """(B, N, D) to (B, k, D): each token is a mean of all features under weights that are computed from them."""

    def __init__(self, channels: int, tokens: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels)
        self.score = nn.Sequential(nn.Linear(channels, channels), nn.GELU(), nn.Linear(channels, tokens))

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Weighted means of (B, N, D) features."""
        x = self.norm(features)
        weights = torch.softmax(self.score(x), dim=1)  # over the N features
        return weights.transpose(1, 2) @ x


class Perceiver(nn.Module):
    """(B, N, D) to (B, k, D): k learnt queries attend to the features and to each other, in blocks."""

    def __init__(self, channels: int, tokens: int) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.randn(tokens, channels) * channels**-0.5)
        self.norm = nn.LayerNorm(channels)
        self.blocks = nn.ModuleList(_Block(channels) for _ in range(DEPTH))

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Resample (B, N, D) features."""
        x = self.norm(features)
        queries = self.queries.expand(len(features), -1, -1)
        for block in self.blocks:
            queries = block(queries, x)
        return queries


class _Block(nn.Module):
    """Attention of the queries to features and queries, then two Linears; both residual."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels)
        self.attention = nn.MultiheadAttention(channels, _heads(channels), batch_first=True)
        self.mlp = nn.Sequential(
            nn.LayerNorm(channels), nn.Linear(channels, 4 * channels), nn.GELU(), nn.Linear(4 * channels, channels)
        )

    def forward(self, queries: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
        normed = self.norm(queries)
        seen = torch.cat([features, normed], dim=1)
        queries = queries + self.attention(normed, seen, seen, need_weights=False)[0]
        return queries + self.mlp(queries)


def _heads(channels: int) -> int:
    wanted = max(1, channels / HEAD_CHANNELS)
    return min((n for n in range(1, channels + 1) if channels % n == 0), key=lambda n: (abs(n - wanted), n))
