from __future__ import annotations

import pytest
import torch
from servable import sample_row, servable_model

from nvila.components.contracts.errors import ConfigError, QuantizationError
from nvila.components.contracts.recipe.quantize import QuantizeSettings
from nvila.components.data.samples import Sample
from nvila.components.model.vision.tower import tower_features
from nvila.components.quantize.calibrate import choose_samples
from nvila.components.quantize.scheme import module_map
from nvila.components.quantize.smooth import smooth_tower

TOWER = "vision_tower.vision_model.encoder.layers.0.mlp.fc1"
DECODER = "llm.model.layers.0.mlp.up_proj"
WANTED = QuantizeSettings(group_size=64)


def test_pattern_that_matches_nothing_is_an_error() -> None:
    """A renamed module would otherwise leave half the model in bf16 without a word."""
    with pytest.raises(QuantizationError, match="the pattern of llm matches no Linear"):
        module_map({TOWER: (192, 96)}, WANTED)


def test_unused_blocks_do_not_count_as_matches() -> None:
    """A tower whose every block lies above the selected one has nothing to quantize."""
    with pytest.raises(QuantizationError, match="the pattern of vision_tower matches no Linear"):
        module_map({TOWER: None, DECODER: (256, 128)}, WANTED)


def test_linear_without_a_pattern_is_an_error() -> None:
    """A new layer must be decided about, not forgotten."""
    with pytest.raises(QuantizationError, match=r"llm\.adapter\.down: no pattern says"):
        module_map({TOWER: (192, 96), DECODER: (256, 128), "llm.adapter.down": (8, 128)}, WANTED)


def test_features_that_4_bit_kernels_cannot_take() -> None:
    """vLLM would refuse the checkpoint only when it is loaded; 48 is divided by 16 but not by 32."""
    with pytest.raises(ConfigError, match="no multiple of 32"):
        module_map({TOWER: (192, 96), DECODER: (256, 48)}, QuantizeSettings(group_size=16))


def test_calibration_is_spread_over_sources_and_deterministic() -> None:
    """The first source of the table alone would calibrate the model for one kind of picture."""
    samples = [_sample(source, i) for source, count in (("a", 50), ("b", 3), ("c", 50)) for i in range(count)]
    chosen = choose_samples(samples, 15, seed=1)
    assert {source: sum(s.source == source for s in chosen) for source in "abc"} == {"a": 6, "b": 3, "c": 6}
    assert chosen == choose_samples(samples[::-1], 15, seed=1)
    assert chosen != choose_samples(samples, 15, seed=2)


def test_no_training_sample_is_an_error() -> None:
    """Calibrating on nothing would give scales of nothing."""
    with pytest.raises(QuantizationError, match="no training samples"):
        choose_samples([], 4, seed=0)


def test_smoothing_keeps_the_features_and_evens_the_activations() -> None:
    """Scales folded into the norm but not into every follower change the model; without effect it is no smoothing."""
    model, _ = servable_model()
    tiles = torch.randn(4, 3, 28, 28, generator=torch.Generator().manual_seed(0))
    block = model.vision_tower.encoder.layers[0]
    with torch.no_grad():
        block.layer_norm1.weight[5] *= 40  # an outlier channel
        before = tower_features(model.vision_tower, tiles, -2)
        spread = _spread(model, block, tiles)
        smooth_tower(model, [tiles], 0.3)
        after = tower_features(model.vision_tower, tiles, -2)
    assert torch.allclose(before, after, rtol=1e-3, atol=1e-3 * float(before.abs().max()))
    assert _spread(model, block, tiles) < 0.7 * spread


def _spread(model: torch.nn.Module, block: torch.nn.Module, tiles: torch.Tensor) -> float:
    """Largest channel over the median one, behind the first norm."""
    with torch.no_grad():
        out = block.layer_norm1(model.vision_tower.embeddings(tiles)).abs().flatten(0, 1).amax(0)
    return float(out.max() / out.median())


def _sample(source: str, number: int) -> Sample:
    from pathlib import Path

    from nvila.components.data.samples import _sample as parse

    return parse(sample_row(source, number, Path("/data"), "x.png"))
