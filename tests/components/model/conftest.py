"""A tiny NVILA of the real parts: 28-pixel tiles, patch 14, so one token a tile behind the 2x2 projector."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from nvila.components.data.sampling import Sampling
from nvila.components.model.config.config import ModelConfig
from nvila.components.model.fresh import init_model
from nvila.components.model.nvila import NVILA
from nvila.components.model.text.tokenizer import train_tokenizer

TEXTS = ["Which digit is in row 2, column 1?", "Is the circle red?\nyes no", "three four seven", "naïve café 東京"]

Configure = Callable[..., ModelConfig]


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def make_config(**changes: Any) -> ModelConfig:
    tile = changes.pop("tile", 28)
    layers = changes.pop("tower_layers", 3)
    vision = {
        "hidden_size": 24,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
        "intermediate_size": 48,
        "image_size": tile,
        "patch_size": 14,
        "vision_use_head": False,
    }
    llm = {
        "vocab_size": 300,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 64,
        "max_position_embeddings": 512,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
    }
    llm |= changes.pop("llm", {})
    fields: dict[str, Any] = {
        "vision": vision,
        "llm": llm,
        "projector": "mlp_downsample",
        "vision_mode": "dynamic_s2",
        "s2_scales": (tile, 2 * tile),
        "s2_output_scale": -1,
        "max_tiles": 6,
        "select_layer": -2,
        "max_length_tokens": 256,
        "sampling": Sampling(4),
        "video_pool_sizes": ((2, 1, 1),),
    }
    mode = changes.get("vision_mode", "dynamic_s2")
    if mode in ("resize", "pad", "dynamic"):
        fields["s2_scales"] = (tile,)
    return ModelConfig(**{**fields, **changes})


@pytest.fixture(scope="session")
def configure() -> Configure:
    return make_config


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    return train_tokenizer(TEXTS, 300)


@pytest.fixture
def model(tokenizer: Any) -> NVILA:
    return init_model(make_config(), tokenizer, seed=0).eval()


@pytest.fixture
def picture() -> Callable[..., Image.Image]:
    def make(width: int = 56, height: int = 56, seed: int = 0) -> Image.Image:
        pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
        return Image.fromarray(pixels)

    return make
