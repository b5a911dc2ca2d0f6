"""Mean pooling of a video's projected tokens over time and space (TSP encoder); paper section 2.2, spec section 1.6."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from nvila.components.contracts.errors import ConfigError


def temporal_pool(features: torch.Tensor, pool_sizes: Sequence[tuple[int, int, int]]) -> list[torch.Tensor]:
    """Non-overlapping means over time, rows and columns, once for each pool size.

    Args:
        features: (..., T, N, C) with the N tokens of a frame in a square, row by row.
        pool_sizes: (time, vertical, horizontal) of each scale.

    Returns:
        One (..., T / pt, N / (ph * pw), C) per scale, in order.

    Raises:
        ConfigError: a pool does not divide the frames or the token square.
    """
    *lead, t, n, c = features.shape
    side = round(n**0.5)
    if side * side != n:
        raise ConfigError("a frame's tokens form no square", where="video_pool_sizes", value=n)
    pooled = []
    for pt, ph, pw in pool_sizes:
        if t % pt or side % ph or side % pw:
            raise ConfigError(
                f"pool does not divide {t} frames of {side} x {side} tokens",
                where="video_pool_sizes",
                value=(pt, ph, pw),
                do="Choose frames and pools that divide",
            )
        cells = features.reshape(*lead, t // pt, pt, side // ph, ph, side // pw, pw, c)
        pooled.append(cells.mean(dim=(-6, -4, -2)).flatten(-3, -2))
    return pooled
