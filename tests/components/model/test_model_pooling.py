import numpy as np
import pytest
import torch

from nvila.components.contracts.errors import ConfigError
from nvila.components.model.vision.pooling import temporal_pool


@pytest.mark.parametrize("pool", [(1, 1, 1), (4, 1, 1), (2, 2, 1), (1, 1, 4), (2, 2, 2)])
def test_means(pool: tuple[int, int, int]) -> None:
    """Prevents pooling over the wrong axis or with overlap, against literal loops."""
    x = torch.randn(8, 16, 3)
    (pooled,) = temporal_pool(x, [pool])
    pt, ph, pw = pool
    grid = x.view(8, 4, 4, 3).numpy()
    expected = np.array(
        [
            [
                grid[t : t + pt, r : r + ph, c : c + pw].mean(axis=(0, 1, 2))
                for r in range(0, 4, ph)
                for c in range(0, 4, pw)
            ]
            for t in range(0, 8, pt)
        ]
    )
    assert pooled.shape == expected.shape
    assert np.allclose(pooled.numpy(), expected, atol=1e-6)


def test_scales_keep_their_order_and_leading_axes() -> None:
    """Prevents a batch of videos from mixing, and scales from being sorted."""
    x = torch.randn(3, 4, 4, 2)
    coarse, fine = temporal_pool(x, [(4, 2, 2), (1, 1, 1)])
    assert coarse.shape == (3, 1, 1, 2) and torch.equal(fine, x)
    assert torch.allclose(coarse[1, 0, 0], x[1].mean(dim=(0, 1)), atol=1e-6)


def test_a_pool_that_does_not_divide_is_refused() -> None:
    """Prevents a crash deep inside for token squares that no pool fits."""
    with pytest.raises(ConfigError, match="pool"):
        temporal_pool(torch.randn(4, 9, 2), [(1, 2, 1)])


@pytest.mark.parametrize("frames", [1, 3, 6, 7])
def test_the_last_frame_fills_the_last_pool(frames: int) -> None:
    """Prevents a crash for short videos and odd frame counts, and the end of a video from being dropped."""
    x = torch.randn(2, frames, 4, 3)
    (pooled,) = temporal_pool(x, [(4, 1, 1)])
    for index in range(-(-frames // 4)):
        members = [min(4 * index + k, frames - 1) for k in range(4)]
        assert torch.allclose(pooled[:, index], torch.stack([x[:, i] for i in members]).mean(0), atol=1e-6)
    assert pooled.shape[1] == -(-frames // 4)
