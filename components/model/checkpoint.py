"""Checkpoints in the reference's three-folder layout, safetensors only; spec section 2.1.

Reading runs no code of the checkpoint and unpickles nothing. Names inside the files are the reference's.
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
from nvila.components.model.nvila import NVILA, build_model
from nvila.components.model.tokenizer import TokenIds, load_tokenizer, save_tokenizer

PARTS = ("llm", "vision_tower", "mm_projector")
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
    vision, llm = _vision_config(model.config), _llm_config(model, tokenizer)
    config = replace(model.config, vision=vision, llm=llm).to_json()
    for part in PARTS:
        tensors = {name.removeprefix(f"{part}."): t for name, t in state.items() if name.startswith(f"{part}.")}
        (folder / part).mkdir(parents=True, exist_ok=True)
        if part == "llm" and model.config.llm.get("tie_word_embeddings"):
            tensors.pop("lm_head.weight", None)
        if part == "vision_tower":
            tensors = {TOWER_PREFIX + name: tensor for name, tensor in tensors.items()}
        write_tensors(tensors, folder / part)
    dtype = str(next(model.parameters()).dtype)
    _write_json(folder / "config.json", config | {"model_dtype": dtype})
    _write_json(folder / "llm/config.json", llm)
    _write_json(folder / "llm/generation_config.json", _generation_config(model, tokenizer))
    _write_json(folder / "vision_tower/config.json", vision)
    _write_json(folder / "vision_tower/preprocessor_config.json", _image_processor(model.config.tile_pixels))
    _write_json(
        folder / "mm_projector/config.json", {**config["mm_projector_cfg"], "architectures": ["MultimodalProjector"]}
    )
    save_tokenizer(tokenizer, folder / "llm", model.config.max_length_tokens)


def load_native(folder: Path | str, *, dtype: str = "float32", device: str = "cpu") -> tuple[NVILA, Any]:
    """Read a checkpoint of the native layout, in evaluation mode, with its tokenizer.

    Rows of the decoder's embeddings behind the tokenizer's vocabulary are dropped, as the reference does on loading.

    Raises:
        ConfigError: unknown dtype, or a configuration that cannot be built.
        DataError: a folder, file or tensor is missing, or a shape does not match.
    """
    if dtype not in DTYPES:
        raise ConfigError("unknown dtype", where="dtype", value=dtype, do=f"Use one of {', '.join(DTYPES)}")
    folder = Path(folder)
    config = read_config(folder)
    tokenizer = load_tokenizer(folder / "llm")
    tokens = TokenIds.of(tokenizer)
    model = _empty(config, tokens, DTYPES[dtype])
    for part in PARTS:
        load_part(getattr(model, part), folder / part, tower=part == "vision_tower", rows=tokens.vocabulary)
    return model.to(device).eval(), tokenizer


def read_config(folder: Path | str) -> ModelConfig:
    """The configuration of a native checkpoint; each part's own config.json counts, not the copy at the top."""
    folder = Path(folder)
    content = _read_json(folder / "config.json")
    top = content.get("llm_cfg")
    limits = {k: v for k, v in top.items() if "max_length" in k} if isinstance(top, dict) else {}
    settings = folder / "llm/tokenizer_config.json"
    if not limits and settings.is_file():
        limits = {"tokenizer_model_max_length": _read_json(settings).get("model_max_length")}
    content["llm_cfg"] = {**_read_json(folder / "llm/config.json"), **limits}
    content["vision_tower_cfg"] = _read_json(folder / "vision_tower/config.json")
    content["mm_projector_cfg"] = _read_json(folder / "mm_projector/config.json")
    return ModelConfig.from_json(content, where=str(folder / "config.json"))


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
    found = read_tensors(folder)
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
        raise DataError(what, where=str(folder), value=(missing or extra)[:5], do="Check the checkpoint's config.json")
    for name, tensor in found.items():
        if tensor.shape != wanted[name].shape:
            raise DataError(
                f"{name} has another shape than the configuration says",
                where=str(folder),
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
        names = sorted({str(name) for name in _read_json(index).get("weight_map", {}).values()})
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


def _llm_config(model: NVILA, tokenizer: Any) -> dict[str, Any]:
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": model.tokens.end}
    return {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", **model.config.llm, **ids}


def _generation_config(model: NVILA, tokenizer: Any) -> dict[str, Any]:
    return {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": model.tokens.end,
        "pad_token_id": model.tokens.pad,
        "do_sample": False,
    }


def _image_processor(tile_pixels: int) -> dict[str, Any]:
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


def _read_json(path: Path) -> Any:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise DataError(
            "not there", where=str(path), do="A checkpoint has llm/, vision_tower/ and mm_projector/"
        ) from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DataError("not readable JSON", where=str(path), value=str(error)) from None
    if not isinstance(content, dict):
        raise DataError("not a JSON object", where=str(path))
    return content


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
