"""The published variants as configurations."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from nvila.components.data.sampling import Sampling
from nvila.components.model.config.config import ModelConfig

SIGLIP: dict[str, Any] = {
    "hidden_size": 1152,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "intermediate_size": 4304,
    "image_size": 448,
    "patch_size": 14,
    "hidden_act": "gelu_pytorch_tanh",
    "layer_norm_eps": 1e-6,
    "vision_use_head": False,
}
"""SigLIP so400m at 448 pixels."""


def _qwen(hidden: int, layers: int, heads: int, kv_heads: int, mlp: int, *, tied: bool = False) -> dict[str, Any]:
    return {
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "intermediate_size": mlp,
        "vocab_size": 151648,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "tie_word_embeddings": tied,
    }


QWEN_1_5B = _qwen(1536, 28, 12, 2, 8960, tied=True)
QWEN_7B = _qwen(3584, 28, 28, 4, 18944)
QWEN_14B = _qwen(5120, 48, 40, 8, 13824)


def _scaled(llm: dict[str, Any]) -> ModelConfig:
    """Dynamic-S2 and 2x2 space-to-channel."""
    return ModelConfig(
        vision=SIGLIP,
        llm=llm,
        projector="mlp_downsample",
        vision_mode="dynamic_s2",
        s2_scales=(448, 896, 1344),
        s2_output_scale=-1,
        max_tiles=12,
        select_layer=-2,
        max_length_tokens=8192,
        sampling=Sampling(8),
        video_pool_sizes=((1, 1, 1),),
    )


def _lite(llm: dict[str, Any]) -> ModelConfig:
    """Dynamic tiling and 3x3 space-to-channel."""
    return replace(
        _scaled(llm),
        projector="mlp_downsample_3x3_fix",
        vision_mode="dynamic",
        s2_scales=(448,),
        max_length_tokens=4096,
    )


def _video(llm: dict[str, Any], projector: str) -> ModelConfig:
    """256 frames of one tile, eight pooled into one."""
    return replace(
        _lite(llm),
        projector=projector,
        vision_mode="resize",
        max_length_tokens=16384,
        sampling=Sampling(256),
        video_pool_sizes=((8, 1, 1),),
    )


VARIANTS: dict[str, ModelConfig] = {
    "NVILA-8B": _scaled(QWEN_7B),
    "NVILA-15B": _scaled(QWEN_14B),
    "NVILA-Lite-2B": _lite(QWEN_1_5B),
    "NVILA-Lite-8B": _lite(QWEN_7B),
    "NVILA-Lite-15B": _lite(QWEN_14B),
    "NVILA-8B-Video": _video(QWEN_7B, "mlp_downsample_2x2_fix"),
    "NVILA-Lite-15B-Video": _video(QWEN_14B, "mlp_downsample_3x3_fix"),
}
"""By the name of the published checkpoint."""


def variant_of(config: ModelConfig) -> str | None:
    """Name of the published variant with this architecture, whatever its limits and frames; None for another."""
    return next((name for name, known in VARIANTS.items() if _shape(known) == _shape(config)), None)


def _shape(config: ModelConfig) -> tuple[Any, ...]:
    sizes = ("hidden_size", "num_hidden_layers", "intermediate_size")
    projector = "mlp_downsample" if config.projector == "mlp_downsample_2x2_fix" else config.projector
    parts = (tuple(part.get(name) for name in sizes) for part in (config.vision, config.llm))
    return (*parts, projector, config.vision_mode, config.s2_scales)
