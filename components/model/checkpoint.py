"""Models from and to checkpoints, safetensors only: three folders both ways, the flat layout in.

Reading runs no code of the checkpoint and unpickles nothing. Names inside the files are the reference's. What a
checkpoint is, without loading it, is found in `layouts`; `convert` goes from one layout to another.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from nvila.components.contracts.errors import ConfigError, DataError
from nvila.components.model.config import ModelConfig, with_vocabulary
from nvila.components.model.device import use_flash_attention
from nvila.components.model.layouts import PARTS, part_folders, read_hf_config, read_json
from nvila.components.model.layouts import read_native_config as read_config
from nvila.components.model.nvila import NVILA, build_model
from nvila.components.model.rope import with_rope
from nvila.components.model.timetokens import TIME_FORMAT, check_time_tokens, time_token_ids
from nvila.components.model.tokenizer import TokenIds, load_tokenizer, save_tokenizer, template_name

__all__ = ["DTYPES", "load_flat", "load_native", "load_part", "read_config", "read_tensors", "save_native"]

TOWER_PREFIX = "vision_model."
"""Of the tower's tensors in files; transformers 5 has none in memory."""
SHARD_BYTES = 5 * 10**9
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def save_native(
    model: NVILA, tokenizer: Any, folder: Path | str, *, state_dict: Mapping[str, torch.Tensor] | None = None
) -> None:
    """Write config.json, llm/ (with the tokenizer), vision_tower/ and mm_projector/.

    Args:
        model: whose weights and configuration are saved, in the dtype they have.
        tokenizer: the model's; saved without the media markers.
        folder: made if missing.
        state_dict: whole tensors by the model's names, where the model itself holds only parts of them (ZeRO-3).
    """
    folder = Path(folder)
    state = state_dict if state_dict is not None else model.state_dict()
    for part in PARTS:
        tensors = {name.removeprefix(f"{part}."): t for name, t in state.items() if name.startswith(f"{part}.")}
        (folder / part).mkdir(parents=True, exist_ok=True)
        if part == "llm" and model.config.llm.get("tie_word_embeddings"):
            tensors.pop("lm_head.weight", None)
        if part == "vision_tower":
            tensors = {TOWER_PREFIX + name: tensor for name, tensor in tensors.items()}
        write_tensors(tensors, folder / part)
    write_native_files(model.config, tokenizer, folder, str(next(model.parameters()).dtype))


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
    _write_json(folder / "llm/generation_config.json", generation_config(tokenizer))
    _write_json(folder / "vision_tower/config.json", vision)
    _write_json(folder / "vision_tower/preprocessor_config.json", image_processor(config.tile_pixels))
    _write_json(
        folder / "mm_projector/config.json", {**content["mm_projector_cfg"], "architectures": ["MultimodalProjector"]}
    )
    save_tokenizer(tokenizer, folder / "llm", config.max_length_tokens)


def load_native(folder: Path | str, *, dtype: str = "float32", device: str = "cpu") -> tuple[NVILA, Any]:
    """Read a checkpoint of the native layout, in evaluation mode, with its tokenizer.

    Rows of the decoder's embeddings behind the tokenizer's vocabulary are dropped, as the reference does on loading.

    Raises:
        ConfigError: unknown dtype, or a configuration that cannot be built.
        DataError: a folder, file or tensor is missing, or a shape does not match.
    """
    folder = Path(folder)
    wanted = _dtype(dtype)
    config, folders = read_config(folder), part_folders(folder)
    tokenizer = load_tokenizer(folders["llm"], folder)
    model = _empty(config, TokenIds.of(tokenizer, config.video_texts), wanted)
    for part in PARTS:
        load_part(getattr(model, part), folders[part], tower=part == "vision_tower", rows=model.tokens.vocabulary)
    model = model.to(device).eval()
    use_flash_attention(model)
    return model, tokenizer


def load_flat(folder: Path | str, *, dtype: str = "float32", device: str = "cpu") -> tuple[NVILA, Any]:
    """Read a checkpoint of the flat layout (published as NVILA-8B-hf), as `load_native`."""
    folder = Path(folder)
    wanted = _dtype(dtype)
    config, tokenizer = read_hf_config(folder), load_tokenizer(folder)
    model, tensors = _empty(config, TokenIds.of(tokenizer, config.video_texts), wanted), read_tensors(folder)
    if strange := sorted(name for name in tensors if not name.startswith(tuple(f"{part}." for part in PARTS))):
        raise DataError("tensors that the model does not have", where=str(folder), value=strange[:5])
    for part in PARTS:
        own = {name.removeprefix(f"{part}."): t for name, t in tensors.items() if name.startswith(f"{part}.")}
        fill_part(getattr(model, part), own, str(folder), tower=part == "vision_tower", rows=model.tokens.vocabulary)
    model = model.to(device).eval()
    use_flash_attention(model)
    return model, tokenizer


def _dtype(name: str) -> torch.dtype:
    if name not in DTYPES:
        raise ConfigError("unknown dtype", where="dtype", value=name, do=f"Use one of {', '.join(DTYPES)}")
    return DTYPES[name]


def load_part(module: nn.Module, folder: Path, *, tower: bool = False, rows: int | None = None) -> None:
    """Fill one sub-model from a folder of safetensors.

    Args:
        module: SigLIP tower, projector or Qwen2 decoder.
        folder: `model.safetensors`, or shards with their index.
        tower: names may carry the `vision_model.` prefix, and a pooling head that the model lacks is ignored.
        rows: vocabulary rows to keep of the decoder's embeddings.

    Raises:
        DataError: a tensor is missing, superfluous or of another shape.
    """
    fill_part(module, read_tensors(folder), str(folder), tower=tower, rows=rows)


def fill_part(
    module: nn.Module, found: dict[str, torch.Tensor], where: str, *, tower: bool = False, rows: int | None = None
) -> None:
    """Fill one sub-model from tensors that were read at `where`; arguments and errors as of `load_part`."""
    wanted = module.state_dict()
    if tower:
        if any(name.startswith(TOWER_PREFIX) for name in found):  # a whole SigLIP holds a text tower beside it
            found = {name: tensor for name, tensor in found.items() if name.startswith(TOWER_PREFIX)}
        found = {name.removeprefix(TOWER_PREFIX): tensor for name, tensor in found.items()}
        found = {name: t for name, t in found.items() if name in wanted or not name.startswith("head.")}
    embeddings = "model.embed_tokens.weight"
    if "lm_head.weight" in wanted and embeddings in found:
        tied = getattr(getattr(module, "config", None), "tie_word_embeddings", False)
        if tied:
            found["lm_head.weight"] = found[embeddings]
        for name in (embeddings, "lm_head.weight"):
            if name in found:
                found[name] = found[name][:rows]
    missing, extra = sorted(wanted.keys() - found.keys()), sorted(found.keys() - wanted.keys())
    if missing or extra:
        what = "tensors are missing" if missing else "tensors that the model does not have"
        raise DataError(what, where=where, value=(missing or extra)[:5], do="Check the checkpoint's config.json")
    for name, tensor in found.items():
        if tensor.shape != wanted[name].shape:
            raise DataError(
                f"{name} has another shape than the configuration says",
                where=where,
                value=f"{tuple(tensor.shape)} instead of {tuple(wanted[name].shape)}",
            )
    module.load_state_dict(found)


def read_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a folder, from one safetensors file or its indexed shards."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    index = folder / "model.safetensors.index.json"
    names = ["model.safetensors"]
    if index.is_file():
        names = sorted({str(name) for name in read_json(index).get("weight_map", {}).values()})
    tensors: dict[str, torch.Tensor] = {}
    for name in names:
        path = folder / name
        if Path(name).name != name or not path.is_file():
            raise DataError("weights are missing", where=str(path), do="Only safetensors are read")
        try:
            tensors |= load_file(path)
        except SafetensorError as error:
            raise DataError("not a safetensors file", where=str(path), value=str(error)) from None
    return tensors


def _empty(config: ModelConfig, tokens: TokenIds, dtype: torch.dtype) -> NVILA:
    """The modules without the cost of random weights. A decoder with more rows than tokens is built without them."""
    from transformers.initialization import no_init_weights

    check_time_tokens(tokens.time, config.time_tokens)
    if config.llm["vocab_size"] < tokens.vocabulary:
        raise ConfigError(
            f"the decoder has {config.llm['vocab_size']} tokens, the tokenizer {tokens.vocabulary}",
            where="llm/config.json: vocab_size",
        )
    with no_init_weights():
        model = build_model(with_vocabulary(config, tokens.vocabulary), tokens, dtype)
    model.llm.tie_weights()
    return model


def write_tensors(tensors: Mapping[str, torch.Tensor], folder: Path) -> None:
    """One `model.safetensors`, or shards of at most `SHARD_BYTES` and their index."""
    from safetensors.torch import save_file

    shards: list[dict[str, torch.Tensor]] = [{}]
    size = 0
    for name, tensor in tensors.items():
        if size and size + tensor.nbytes > SHARD_BYTES:
            shards.append({})
            size = 0
        shards[-1][name] = tensor.detach().cpu().contiguous()
        size += tensor.nbytes
    if len(shards) == 1:
        save_file(shards[0], folder / "model.safetensors", metadata={"format": "pt"})
        return
    names = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    for name, shard in zip(names, shards, strict=True):
        save_file(shard, folder / name, metadata={"format": "pt"})
    total = sum(tensor.nbytes for tensor in tensors.values())
    weight_map = {tensor: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
    _write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map})


def _vision_config(config: ModelConfig) -> dict[str, Any]:
    kind = {"architectures": ["SiglipVisionModel"], "model_type": "siglip_vision_model", "vision_use_head": False}
    return {**kind, **config.vision}


def _llm_config(config: ModelConfig, tokenizer: Any) -> dict[str, Any]:
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": TokenIds.of(tokenizer).end}
    llm = with_rope(config.llm, config.max_length_tokens)
    return {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", **llm, **ids}


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
