"""Mean pooling of a video's projected tokens over time and space; paper section 2.2, `llava/model/encoders/video`."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from nvila.components.contracts.errors import ConfigError


def temporal_pool(features: torch.Tensor, pool_sizes: Sequence[tuple[int, int, int]]) -> list[torch.Tensor]:
    """Non-overlapping means over time, rows and columns, once for each pool size.

    Frames that do not fill the last pool (a short video, or several pool sizes over one number of frames) are made up
    by repeating the last frame, so the end of a video is never dropped. Token squares must divide.

    Args:
        features: (..., T, N, C) with the N tokens of a frame in a square, row by row.
        pool_sizes: (time, vertical, horizontal) of each scale.

    Returns:
        One (..., ceil(T / pt), N / (ph * pw), C) per scale, in order.

    Raises:
        ConfigError: a pool does not divide the token square.
    """
    *lead, t, n, c = features.shape
    side = round(n**0.5)
    if side * side != n:
        raise ConfigError("a frame's tokens form no square", where="video_pool_sizes", value=n)
    pooled = []
    for pt, ph, pw in pool_sizes:
        if side % ph or side % pw:
            raise ConfigError(
                f"pool does not divide {side} x {side} tokens",
                where="video_pool_sizes",
                value=(pt, ph, pw),
                do="Choose pools that divide",
            )
        short = -t % pt
        last = features[..., -1:, :, :].expand(*lead, short, n, c)
        whole = torch.cat([features, last], dim=-3) if short else features
        cells = whole.reshape(*lead, (t + short) // pt, pt, side // ph, ph, side // pw, pw, c)
        pooled.append(cells.mean(dim=(-6, -4, -2)).flatten(-3, -2))
    return pooled
