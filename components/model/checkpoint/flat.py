"""The flat layouts, as published and as served, and the door that any layout goes in by; no tensor is loaded here."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nvila.components.contracts.errors import ConfigError, DataError
from nvila.components.contracts.foreign import reading
from nvila.components.model.checkpoint.layouts import (
    HF_KINDS,
    Checkpoint,
    checked_config,
    checkpoint_root,
    described,
    open_native,
    read_json,
    read_optional,
    recognise,
    with_generation,
)
from nvila.components.model.checkpoint.shards import read_folder
from nvila.components.model.config.config import ModelConfig
from nvila.components.model.config.rope import with_rope


def open_checkpoint(folder: Path | str) -> Checkpoint:
    """Recognise and describe a checkpoint of any layout.

    Raises:
        DataError: no checkpoint, or files are missing or broken.
        ConfigError: a configuration that this model does not compute.
    """
    with reading(folder):
        folder = checkpoint_root(Path(folder))
        layout = recognise(folder)
        if layout in ("native", "vila"):
            return open_native(folder)
        config = _serving_config(folder) if layout == "serving" else read_hf_config(folder)
        return described(folder, layout, config, folder, read_folder(folder))


def read_hf_config(folder: Path) -> ModelConfig:
    """The configuration of a flat checkpoint; what it does not say is what `model_type` stands for."""
    content = read_json(folder / "config.json")
    kind = str(content.get("model_type"))
    mode, projector = HF_KINDS[kind]
    vision = _section(content, "vision_config", folder)
    side = int(vision.get("image_size", 448))
    says = {
        "image_aspect_ratio": mode,
        "dynamic_s2": mode == "dynamic_s2",
        "s2_scales": [side, 2 * side, 3 * side],
        "s2_resize_output_to_scale_idx": -1,
        "mm_projector_cfg": {"mm_projector_type": projector},
    }
    length = content.get("tokenizer_model_max_length")
    if length is None:
        length = read_optional(folder / "tokenizer_config.json").get("model_max_length")
    llm = {**_section(content, "text_config", folder), "tokenizer_model_max_length": length}
    llm.setdefault("tie_word_embeddings", bool(content.get("tie_word_embeddings")))  # may stand at the top alone
    merged = {**says, **content, "llm_cfg": llm, "vision_tower_cfg": vision}
    return with_generation(checked_config(merged, folder / "config.json", folder), folder)


def hf_config(config: ModelConfig, image_token_id: int, video_token_id: int) -> dict[str, Any]:
    """`config.json` of the flat layout; the reference's keys ride along so that nothing is lost on the way back.

    Raises:
        ConfigError: vision mode and projector that readers of this layout do not build.
    """
    wanted = (config.vision_mode, config.projector)
    if wanted == ("dynamic_s2", "mlp_downsample_2x2_fix"):  # another name of the same function
        wanted = HF_KINDS["nvila"]
    kind = next((kind for kind, builds in HF_KINDS.items() if builds == wanted), None)
    if kind is None:
        raise ConfigError(
            "the hf layout has no place for this vision mode and projector",
            where="vision_mode, projector",
            value=wanted,
            do="Convert to native, vila or serving",
        )
    content = config.to_json()
    llm, vision = content.pop("llm_cfg"), content.pop("vision_tower_cfg")
    name = "NVILAForConditionalGeneration" if kind == "nvila" else "NVILALiteForConditionalGeneration"
    return {
        **content,
        "mm_projector_cfg": {"mm_projector_type": wanted[1], "model_type": "v2l_projector"},
        "architectures": [name],
        "model_type": kind,
        "tokenizer_model_max_length": config.max_length_tokens,
        "text_config": {
            "model_type": "qwen2",
            **with_rope(config.llm, config.max_length_tokens),
            "vocab_size": llm["vocab_size"],
        },
        "vision_config": {"model_type": "siglip_vision_model", **vision},
        "image_token_id": image_token_id,
        "video_token_id": video_token_id,
    }


def _serving_config(folder: Path) -> ModelConfig:
    content = read_json(folder / "config.json")
    with reading(folder / "config.json"):
        config = ModelConfig.from_json(_section(content, "nvila", folder), where=str(folder / "config.json"))
    return with_generation(config, folder)


def _section(content: Mapping[str, Any], name: str, folder: Path) -> dict[str, Any]:
    section = content.get(name)
    if not isinstance(section, dict):
        raise DataError("not a JSON object", where=f"{folder / 'config.json'}: {name}")
    return dict(section)
