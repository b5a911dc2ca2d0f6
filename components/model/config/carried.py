"""Top-level keys of `config.json` that decide nothing here and travel with the model, whatever becomes of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_OF_THE_MODEL = """
hidden_size mm_hidden_size image_aspect_ratio s2 dynamic_s2 s2_scales s2_max_split_size s2_resize_output_to_scale_idx
min_tiles max_tiles video_max_tiles num_video_frames fps mm_vision_select_layer image_encoder video_encoder soft_ce_std
llm_cfg vision_tower_cfg mm_projector_cfg num_time_tokens time_token_format time_token_ids model_dtype chat_template
"""
_OF_A_LAYOUT = """
architectures model_type auto_map text_config vision_config image_token_id video_token_id newline_token_id nvila
tokenizer_model_max_length dtype torch_dtype tie_word_embeddings quantization_config
"""
_WRITTEN = frozenset((_OF_THE_MODEL + _OF_A_LAYOUT).split())
"""Keys that follow from the model or from a layout, and so are written anew. What `auto_map` names stays behind."""


def carried_keys(content: Mapping[str, Any]) -> dict[str, Any]:
    """All others: those we do not know, and those of which only harmless values are accepted."""
    of_remote_code = {"version"} if content.get("model_type") == "vila" else set()
    return {key: value for key, value in content.items() if key not in _WRITTEN | of_remote_code}
