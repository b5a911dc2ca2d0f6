"""Hugging Face configurations of towers and decoders that are made from scratch at the sizes a recipe names."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nvila.components.contracts.recipe.model import DecoderSizes, TowerSizes


def tower_config(sizes: TowerSizes, tile_pixels: int) -> dict[str, Any]:
    """A SigLIP tower of these sizes: no class token, no pooling head (spec section 1.1)."""
    return {
        "architectures": ["SiglipVisionModel"],
        "model_type": "siglip_vision_model",
        "hidden_size": sizes.hidden,
        "num_hidden_layers": sizes.layers,
        "num_attention_heads": sizes.heads,
        "intermediate_size": sizes.mlp,
        "image_size": tile_pixels,
        "patch_size": sizes.patch_pixels,
        "num_channels": 3,
        "hidden_act": "gelu_pytorch_tanh",
        "layer_norm_eps": 1e-6,
        "attention_dropout": 0.0,
        "vision_use_head": False,
    }


def decoder_config(sizes: DecoderSizes, vocabulary: int, max_length_tokens: int) -> dict[str, Any]:
    """A Qwen2 decoder of these sizes with `vocabulary` tokens and tied embeddings."""
    return {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "vocab_size": vocabulary,
        "hidden_size": sizes.hidden,
        "num_hidden_layers": sizes.layers,
        "num_attention_heads": sizes.heads,
        "num_key_value_heads": sizes.kv_heads,
        "intermediate_size": sizes.mlp,
        "max_position_embeddings": max_length_tokens,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "tie_word_embeddings": True,
        "use_sliding_window": False,
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
    }
