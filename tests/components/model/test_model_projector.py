import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nvila.components.contracts.errors import ConfigError
from nvila.components.model.vision.projector import SpaceToChannel, build_projector, projected_side
from nvila.components.model.vision.resampler import TokenLearner


@given(st.integers(1, 2), st.integers(1, 9), st.sampled_from([2, 3]), st.integers(1, 3))
@settings(deadline=None)
def test_space_to_channel(batch: int, side: int, k: int, channels: int) -> None:
    """Prevents column-major cells, padding at the top or left, or another token order, for any map size."""
    x = torch.randn(batch, side * side, channels)
    cells = -(-side // k)
    padded = np.zeros((batch, cells * k, cells * k, channels), dtype=np.float32)
    padded[:, :side, :side] = x.view(batch, side, side, channels).numpy()
    expected = np.stack(
        [
            np.concatenate([padded[:, k * i + r, k * j + c] for r in range(k) for c in range(k)], axis=-1)
            for i in range(cells)
            for j in range(cells)
        ],
        axis=1,
    )
    assert np.array_equal(SpaceToChannel(k)(x).numpy(), expected)


def test_token_counts_of_the_real_tower() -> None:
    """Prevents other token counts than the published 256 and 121 a tile."""
    x = torch.zeros(1, 32 * 32, 4)
    assert build_projector("mlp_downsample", 4, 8)(x).shape == (1, 256, 8)
    assert build_projector("mlp_downsample_2x2_fix", 4, 8)(x).shape == (1, 256, 8)
    assert build_projector("mlp_downsample_3x3_fix", 4, 8)(x).shape == (1, 121, 8)
    assert build_projector("linear", 4, 8)(x).shape == (1, 1024, 8)
    assert build_projector("mlp2x_gelu", 4, 8)(x).shape == (1, 1024, 8)


@pytest.mark.parametrize(
    ("kind", "shapes", "downsample"),
    [
        ("linear", {"": (8, 4)}, 1),
        ("identity", {}, 1),
        ("mlp1x_gelu", {0: (8, 4)}, 1),
        ("mlp2x_gelu", {0: (8, 4), 2: (8, 8)}, 1),
        ("mlp4x_gelu", {0: (8, 4), 2: (8, 8), 4: (8, 8), 6: (8, 8)}, 1),
        ("mlp_downsample", {1: (16,), 2: (8, 16), 4: (8, 8)}, 2),
        ("mlp_downsample_2x2_fix", {1: (16,), 2: (8, 16), 4: (8, 8)}, 2),
        ("mlp_downsample_3x3_fix", {1: (36,), 2: (12, 36), 4: (12,), 5: (8, 12), 7: (8, 8)}, 3),
        (
            "mlp_downsample_3x3_s2",
            {1: (36,), 2: (12, 36), 4: (12,), 5: (4, 12), 7: (4,), 8: (1, 4), 10: (1,), 11: (8, 1), 13: (8, 8)},
            3,
        ),
        (
            "mlp_downsample_3x3_s2_new",
            {1: (36,), 2: (16, 36), 4: (16,), 5: (8, 16), 7: (8,), 8: (4, 8)}
            | {10: (4,), 11: (1, 4), 13: (1,), 14: (8, 1), 16: (8, 8)},
            3,
        ),
    ],
)
def test_names_and_shapes_of_published_weights(
    kind: str, shapes: dict[int | str, tuple[int, ...]], downsample: int
) -> None:
    """Prevents state-dict names under which published projectors would not load."""
    projector = build_projector(kind, 8 if kind == "identity" else 4, 8)
    weights = {name: tuple(t.shape) for name, t in projector.state_dict().items() if name.endswith("weight")}
    names = {f"layers.{i}" if i != "" else "layers": shape for i, shape in shapes.items()}
    assert weights == {f"{name}.weight": shape for name, shape in names.items()}
    assert {f"{name}.bias" for name in names} <= projector.state_dict().keys()
    assert projector.downsample == downsample


def test_unknown_kind() -> None:
    """Prevents a traceback instead of the list of projectors."""
    with pytest.raises(ConfigError, match="mlp_downsample_3x3_fix"):
        build_projector("mlp_upsample", 4, 8)
    for kind in ("perceiver", "perceiver_0", "mlp0x_gelu", "mlpx_gelu", "mlp2x_gelu_"):
        with pytest.raises(ConfigError, match="unknown projector"):
            build_projector(kind, 4, 8)


def test_identity() -> None:
    """Prevents an identity that changes features, or one that cannot reach the decoder's width."""
    x = torch.randn(2, 9, 8)
    assert torch.equal(build_projector("identity", 8, 8)(x), x)
    with pytest.raises(ConfigError, match="identity"):
        build_projector("identity", 4, 8)


def gelu(x: np.ndarray) -> np.ndarray:
    return x * 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))


def norm(x: np.ndarray, weight: np.ndarray, bias: np.ndarray) -> np.ndarray:
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5) * weight + bias


@pytest.mark.parametrize(
    ("kind", "widths"),
    [
        ("mlp_downsample_3x3_s2", [81, 27, 9, 3, 6]),
        ("mlp_downsample_3x3_s2_new", [81, 36, 18, 9, 3, 6]),
    ],
)
def test_s2_projectors_compute_the_published_chain(kind: str, widths: list[int]) -> None:
    """Prevents a missing norm, an approximate GELU or another order in the two deep projectors."""
    torch.manual_seed(0)
    projector = build_projector(kind, 9, 6).double()
    for parameter in projector.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    weights = {name: tensor.numpy() for name, tensor in projector.state_dict().items()}
    x = torch.randn(2, 36, 9, dtype=torch.float64)
    expected = SpaceToChannel(3)(x).numpy()
    index = 1
    for a, b in pairwise(widths):
        expected = norm(expected, weights[f"layers.{index}.weight"], weights[f"layers.{index}.bias"])
        assert weights[f"layers.{index + 1}.weight"].shape == (b, a)
        expected = gelu(expected @ weights[f"layers.{index + 1}.weight"].T + weights[f"layers.{index + 1}.bias"])
        index += 3
    expected = expected @ weights[f"layers.{index}.weight"].T + weights[f"layers.{index}.bias"]
    assert np.allclose(projector(x).detach().numpy(), expected, atol=1e-9)


@pytest.mark.parametrize("kind", ["token_learner_16", "perceiver_16"])
def test_resamplers(kind: str) -> None:
    """Prevents another number of tokens than the name says, mixing between tiles, and weights that get no gradient."""
    torch.manual_seed(0)
    projector = build_projector(kind, 12, 8)
    x = torch.randn(3, 25, 12)
    out = projector(x)
    assert out.shape == (3, 16, 8) and projected_side(kind, 5) == 4
    assert torch.allclose(projector(x[1:2]), out[1:2], atol=1e-6)
    shuffled = x[:, torch.randperm(25)]  # features carry their place themselves
    assert torch.allclose(projector(shuffled), out, atol=1e-5)
    out.square().sum().backward()
    assert all(p.grad is not None and bool(p.grad.abs().sum() > 0) for p in projector.parameters())
    with pytest.raises(ConfigError, match="square"):
        build_projector(kind.replace("16", "120"), 12, 8)


def test_token_learner_weighs_features() -> None:
    """Prevents tokens that are no weighted means: of equal features each token is that feature, normalised."""
    module = TokenLearner(6, 4)
    one = torch.randn(6)
    expected = torch.nn.functional.layer_norm(one, (6,))
    assert torch.allclose(module(one.expand(2, 9, 6)), expected.expand(2, 4, 6), atol=1e-5)
