"""The serving form of a model: one flat folder of safetensors that vLLM (through our plugin) and `quantized` can read.

Training keeps the reference's three folders (`checkpoint`); vLLM wants one. Names are those of vLLM's modules:
`llm.model.*`, `vision_tower.vision_model.*`, `mm_projector.layers.*`. Blocks of the tower above the selected layer,
its post_layernorm and its head are never computed and are left out.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from nvila.components.contracts.errors import ConfigError
from nvila.components.contracts.manifest import write_atomic
from nvila.components.model.checkpoint.native import write_tensors
from nvila.components.model.checkpoint.weights import HEAD, TOWER, canonical, settle_head, tied, untied
from nvila.components.model.config.config import LINE_BREAK_AFTER
from nvila.components.model.config.rope import check_served
from nvila.components.model.text.jinja import chat_template
from nvila.components.model.text.tokenizer import written_template
from nvila.components.model.vision.tower import used_blocks

if TYPE_CHECKING:
    from nvila.components.model.config.config import ModelConfig
    from nvila.components.model.nvila import NVILA

__all__ = ["chat_template", "is_served", "serving_tensors", "write_serving", "write_serving_files"]

ARCHITECTURE = "NVILAForConditionalGeneration"
MODEL_TYPE = "nvila"
LLM, PROJECTOR = "llm.", "mm_projector."


def serving_tensors(model: NVILA, dtype: torch.dtype = torch.bfloat16) -> dict[str, torch.Tensor]:
    """The model's tensors by their serving names, floating-point ones in `dtype`."""
    found = canonical(model.state_dict(), "", "the model")
    _, tensors = settle_head(model.config, found, model.tokens.vocabulary, "the model")
    served = {name: t for name, t in tensors.items() if not name.startswith(TOWER) or _is_served(name, model.config)}
    return {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in served.items()}


def _is_served(name: str, config: ModelConfig) -> bool:
    return is_served(name.removeprefix("vision_tower."), config)


def is_served(tower_name: str, config: ModelConfig) -> bool:
    """Whether a module or tensor of the vision tower takes part in the features."""
    name = tower_name.removeprefix("vision_model.")
    if name.startswith("encoder.layers."):
        return int(name.split(".")[2]) < used_blocks(config.vision["num_hidden_layers"], config.select_layer)
    return not name.startswith(("post_layernorm", "head"))


def write_serving(
    model: NVILA,
    tokenizer: Any,
    folder: Path,
    *,
    tensors: Mapping[str, torch.Tensor] | None = None,
    dtype: torch.dtype = torch.bfloat16,
    quantization: Mapping[str, Any] | None = None,
) -> int:
    """Write a serving folder.

    Args:
        model: gives the configuration and, unless `tensors` is given, the weights.
        tokenizer: with the media markers; they are saved too, so that a server can tokenize them.
        folder: where to; made when missing.
        tensors: as of `serving_tensors`, some of them replaced by compressed ones.
        dtype: what a server computes in.
        quantization: the `quantization_config` of a compressed checkpoint.

    Returns:
        Bytes of the tensors.
    """
    folder.mkdir(parents=True, exist_ok=True)
    stored = serving_tensors(model, dtype) if tensors is None else tensors
    write_tensors(stored, folder)
    config = model.config if HEAD not in stored else untied(model.config)
    write_serving_files(model, tokenizer, folder, dtype, quantization, config=config)
    return sum(tensor.nbytes for tensor in stored.values())


def require_servable(config: ModelConfig) -> None:
    """Return where a server computes the same as this model.

    Raises:
        ConfigError: it computes something else.
    """
    if config.video_texts != LINE_BREAK_AFTER:
        raise ConfigError(
            "the server puts only a line break behind each frame", where="video_texts", value=config.video_texts
        )
    check_served(config.llm)


def write_serving_files(
    model: NVILA,
    tokenizer: Any,
    folder: Path,
    dtype: torch.dtype,
    quantization: Mapping[str, Any] | None = None,
    *,
    config: ModelConfig,
) -> None:
    """Everything of a serving folder but the weights; the model may be on the meta device.

    `config` is the model's, untied where its output layer is stored. Keys that are only carried stay below `nvila`,
    where vLLM does not take them for its own; of the generation's settings, the tokens that end and pad are ours.
    """
    require_servable(model.config)
    folder.mkdir(parents=True, exist_ok=True)
    ids, computed = model.tokens, {"dtype": str(dtype).removeprefix("torch.")}
    tie = {"tie_word_embeddings": tied(config)}
    content: dict[str, Any] = {
        "architectures": [ARCHITECTURE],
        "model_type": MODEL_TYPE,
        **computed,
        "text_config": _sub_config(model.llm) | computed | tie,
        "vision_config": _sub_config(model.vision_tower) | computed,
        "nvila": config.to_json(),
        "image_token_id": ids.image,
        "video_token_id": ids.video,
        "newline_token_id": ids.newline,
        **tie,
    }
    if quantization is not None:
        content["quantization_config"] = dict(quantization)
    tokenizer.save_pretrained(folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    # vLLM takes no longer prompts than this, whatever the decoder has positions for; it is the limit of training.
    _write_json(folder / "tokenizer_config.json", settings | {"model_max_length": model.config.positions})
    template = written_template(tokenizer, tile_breaks=model.config.vision_mode == "dynamic")
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    ends = {"eos_token_id": ids.end, "pad_token_id": ids.pad}
    _write_json(folder / "generation_config.json", {"do_sample": False, **config.generation, **ends})
    _write_json(folder / "config.json", content)


def _sub_config(part: Any) -> dict[str, Any]:
    """A part's transformers configuration, without the path it was read from."""
    content = part.config.to_dict()
    return {key: value for key, value in content.items() if key not in ("_name_or_path", "quantization_config")}


def _write_json(path: Path, content: Any) -> None:
    write_atomic(path, json.dumps(content, indent=1, sort_keys=True, ensure_ascii=False) + "\n")
