"""Models with fresh weights: whole ones, and decoders of other sizes beside a taught tower."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from nvila.components.model.config.config import ModelConfig, with_vocabulary
from nvila.components.model.nvila import NVILA, build_model
from nvila.components.model.text.tokenizer import TokenIds


def init_model(config: ModelConfig, tokenizer: Any, seed: int) -> NVILA:
    """A model with fresh weights; its decoder gets the tokenizer's vocabulary. The global generator is left alone."""
    tokens = TokenIds.of(tokenizer, config.video_texts)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build_model(with_vocabulary(config, tokens.vocabulary), tokens)


def resized_decoder(model: NVILA, sizes: dict[str, int], seed: int) -> NVILA:
    """A model with the same tower and tokenizer, and a fresh projector and decoder of other sizes.

    Args:
        model: gives tower weights and everything but the sizes.
        sizes: hidden, layers, heads, kv_heads and mlp, as in the recipe's `DecoderSizes`.
        seed: of the fresh weights.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        resized = build_model(with_decoder(model.config, sizes), model.tokens)
    resized.vision_tower.load_state_dict(model.vision_tower.state_dict())
    return resized


def with_decoder(config: ModelConfig, sizes: dict[str, int]) -> ModelConfig:
    """`config` with a decoder of other sizes: hidden, layers, heads, kv_heads and mlp."""
    names = {
        "hidden": "hidden_size",
        "layers": "num_hidden_layers",
        "heads": "num_attention_heads",
        "kv_heads": "num_key_value_heads",
        "mlp": "intermediate_size",
    }
    return replace(config, llm={**config.llm, **{names[size]: value for size, value in sizes.items()}})
