"""Models from and to checkpoints of three folders, safetensors only.

Reading runs no code of the checkpoint and unpickles nothing. Names inside the files are the reference's. What a
checkpoint is, without loading it, is found in `layouts`, and what becomes of its tensors in `weights`; `convert` goes
from one layout to another.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from nvila.components.contracts.errors import ConfigError
from nvila.components.contracts.foreign import reading
from nvila.components.model.checkpoint.changes import with_new_rows
from nvila.components.model.checkpoint.layouts import PARTS, Checkpoint, open_native
from nvila.components.model.checkpoint.layouts import read_native_config as read_config
from nvila.components.model.checkpoint.shards import INDEX, SINGLE
from nvila.components.model.checkpoint.tensorfile import Later, Stored, Whole, write_file
from nvila.components.model.checkpoint.weights import Receive, canonical, check, fill, settle_head
from nvila.components.model.config.config import ModelConfig, with_vocabulary
from nvila.components.model.config.rope import with_rope
from nvila.components.model.device import use_flash_attention, use_float32_products
from nvila.components.model.nvila import NVILA, build_model, empty_model
from nvila.components.model.text.timetokens import TIME_FORMAT, check_time_tokens, time_token_ids
from nvila.components.model.text.tokenizer import TokenIds, load_tokenizer, save_tokenizer, template_name
from nvila.components.model.vision.tower import drop_unused

__all__ = ["DTYPES", "load_native", "read_config", "save_native"]

SHARD_BYTES = 5 * 10**9
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def save_native(
    model: NVILA, tokenizer: Any, folder: Path | str, *, state_dict: Mapping[str, torch.Tensor | Later] | None = None
) -> None:
    """Write config.json, llm/ (with the tokenizer), vision_tower/ and mm_projector/.

    Args:
        model: whose weights and configuration are saved, in the dtype they have.
        tokenizer: the model's; saved without the media markers.
        folder: made if missing.
        state_dict: whole tensors by the model's names, where the model itself holds only parts of them (ZeRO-3); each
            is asked for when it is written.

    Raises:
        DataError: a tensor is missing, superfluous, of another shape, or not finite.
    """
    folder = Path(folder)
    state = canonical(state_dict if state_dict is not None else model.state_dict(), "", str(folder))
    config, tensors = settle_head(model.config, state, model.tokens.vocabulary, str(folder))
    check(tensors, empty_model(config, model.tokens), str(folder))
    for part in PARTS:
        (folder / part).mkdir(parents=True, exist_ok=True)
        own = {name.removeprefix(f"{part}."): t for name, t in tensors.items() if name.startswith(f"{part}.")}
        write_tensors(own, folder / part)
    write_native_files(config, tokenizer, folder, str(next(model.parameters()).dtype))


def write_native_files(config: ModelConfig, tokenizer: Any, folder: Path, dtype: str) -> None:
    """Everything of a native checkpoint but the weights, whose `dtype` is only recorded."""
    vision, llm = _vision_config(config), _llm_config(config, tokenizer)
    content = replace(config, vision=vision, llm=llm).to_json()
    for part in PARTS:
        (folder / part).mkdir(parents=True, exist_ok=True)
    time = list(time_token_ids(tokenizer))
    content["chat_template"] = template_name(tokenizer)
    content |= {"num_time_tokens": len(time), "time_token_format": TIME_FORMAT, "time_token_ids": time}
    _write_json(folder / "config.json", content | {"model_dtype": dtype})
    _write_json(folder / "llm/config.json", llm)
    _write_json(folder / "llm/generation_config.json", config.generation or generation_config(tokenizer))
    _write_json(folder / "vision_tower/config.json", vision)
    _write_json(folder / "vision_tower/preprocessor_config.json", image_processor(config.tile_pixels))
    _write_json(
        folder / "mm_projector/config.json", {**content["mm_projector_cfg"], "architectures": ["MultimodalProjector"]}
    )
    save_tokenizer(tokenizer, folder / "llm", config.max_length_tokens)


def load_native(
    folder: Path | str, *, dtype: str = "float32", device: str = "cpu", receive: Receive | None = None
) -> tuple[NVILA, Any]:
    """Read a checkpoint of the native layout, in evaluation mode, with its tokenizer.

    Rows of the decoder's embeddings behind the tokenizer's vocabulary are dropped, as the reference does on loading.
    `receive` gets each tensor when its turn has come: a process may keep only a share of it.

    Raises:
        ConfigError: unknown dtype, or a configuration that cannot be built.
        DataError: a folder, file or tensor is missing, or a shape does not match.
    """
    return load_opened(open_native(folder), dtype, device, receive)


def load_opened(checkpoint: Checkpoint, dtype: str, device: str, receive: Receive | None = None) -> tuple[NVILA, Any]:
    """Read the weights of a checkpoint of any layout; as `load_native`."""
    wanted, where = _dtype(dtype), str(checkpoint.folder)
    with reading(checkpoint.folder):
        tokenizer = checkpoint.load_tokenizer()
        tokens = TokenIds.of(tokenizer, checkpoint.config.video_texts)
        found = with_new_rows(checkpoint.tensors, tokens.vocabulary - checkpoint.new_tokens, checkpoint.new_tokens)
        config, tensors = settle_head(checkpoint.config, found, tokens.vocabulary, where)
        check(tensors, buildable(config, tokens), where)
    model = unfilled_model(config, tokens, wanted)
    fill(model, tensors, where, *[receive] if receive else [])
    model = model.to(device).eval()
    use_flash_attention(model)
    use_float32_products(model)
    return model, tokenizer


def checked(checkpoint: Checkpoint) -> tuple[NVILA, Any, dict[str, Stored]]:
    """Whether a checkpoint is whole, without reading a value of its weights.

    Returns:
        Its modules on the meta device, its tokenizer, and its tensors, which are exactly those of the modules; a head
        that repeats the embeddings is left out.

    Raises:
        ConfigError: a configuration that cannot be built, or that does not fit the tokenizer.
        DataError: a tensor is missing, superfluous, of another shape, or not of floats.
    """
    where = str(checkpoint.folder)
    with reading(checkpoint.folder):
        tokenizer = load_tokenizer(checkpoint.tokenizer, checkpoint.folder)
        tokens = TokenIds.of(tokenizer, checkpoint.config.video_texts)
        config, tensors = settle_head(checkpoint.config, checkpoint.tensors, tokens.vocabulary, where)
        model = buildable(config, tokens)
        if checkpoint.layout == "serving":
            drop_unused(model.vision_tower, config.select_layer)
        check(tensors, model, where)
    return model, tokenizer, tensors


def _dtype(name: str) -> torch.dtype:
    if name not in DTYPES:
        raise ConfigError("unknown dtype", where="dtype", value=name, do=f"Use one of {', '.join(DTYPES)}")
    return DTYPES[name]


def buildable(config: ModelConfig, tokens: TokenIds) -> NVILA:
    """The modules on the meta device: whether a configuration can be built is found without a byte of its sizes.

    Raises:
        ConfigError: it cannot, or does not fit the tokenizer.
    """
    _require_vocabulary(config, tokens)
    return empty_model(config, tokens)


def unfilled_model(config: ModelConfig, tokens: TokenIds, dtype: torch.dtype) -> NVILA:
    """The modules without the cost of random weights: what memory held stands in them until `weights.fill`.

    A decoder with more rows than tokens is built without them; `buildable` comes first.
    """
    from transformers.initialization import no_init_weights

    with no_init_weights():
        model = build_model(with_vocabulary(config, tokens.vocabulary), tokens, dtype)
    model.llm.tie_weights()
    return model


def _require_vocabulary(config: ModelConfig, tokens: TokenIds) -> None:
    """Raises:
    ConfigError: the decoder has fewer tokens than the tokenizer, or the tokenizer not the time tokens.
    """
    check_time_tokens(tokens.time, config.time_tokens)
    if config.llm["vocab_size"] < tokens.vocabulary:
        raise ConfigError(
            f"the decoder has {config.llm['vocab_size']} tokens, the tokenizer {tokens.vocabulary}",
            where="llm/config.json: vocab_size",
        )


def write_tensors(tensors: Mapping[str, torch.Tensor | Later], folder: Path) -> None:
    """One `model.safetensors`, or shards of at most `SHARD_BYTES` and their index.

    Raises:
        DataError: a value is not finite.
    """
    shards: list[dict[str, torch.Tensor | Later]] = [{}]
    size = 0
    for name, tensor in tensors.items():
        if size and size + tensor.nbytes > SHARD_BYTES:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += tensor.nbytes
    if len(shards) == 1:
        _write_shard(folder / SINGLE, shards[0])
        return
    names = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    for name, shard in zip(names, shards, strict=True):
        _write_shard(folder / name, shard)
    total = sum(tensor.nbytes for tensor in tensors.values())
    weight_map = {tensor: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
    _write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def _write_shard(path: Path, shard: Mapping[str, torch.Tensor | Later]) -> None:
    """One file, as the safetensors library orders it: widest values first, then by name."""
    order = sorted(shard.items(), key=lambda pair: (-pair[1].dtype.itemsize, pair[0]))
    write_file(path, [Whole(name, tensor) for name, tensor in order])


def _vision_config(config: ModelConfig) -> dict[str, Any]:
    kind = {"architectures": ["SiglipVisionModel"], "model_type": "siglip_vision_model"}
    return {**kind, **config.vision, "vision_use_head": False}


def _llm_config(config: ModelConfig, tokenizer: Any) -> dict[str, Any]:
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": TokenIds.of(tokenizer).end}
    llm = with_rope(config.llm, config.max_length_tokens)
    return {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", **ids, **llm}


def generation_config(tokenizer: Any) -> dict[str, Any]:
    """`generation_config.json`: greedy, ended by the token that ends a turn."""
    tokens = TokenIds.of(tokenizer)
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokens.end, "pad_token_id": tokens.pad}
    return {**ids, "do_sample": False}


def image_processor(tile_pixels: int) -> dict[str, Any]:
    """`preprocessor_config.json`: SigLIP's, to tiles of this side."""
    half = [0.5, 0.5, 0.5]
    return {
        "do_convert_rgb": None,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": half,
        "image_processor_type": "SiglipImageProcessor",
        "image_std": half,
        "processor_class": "SiglipProcessor",
        "resample": 3,
        "rescale_factor": 1 / 255,
        "size": {"height": tile_pixels, "width": tile_pixels},
    }


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
