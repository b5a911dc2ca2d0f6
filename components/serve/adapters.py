"""LoRA adapters that a server offers beside its model, each under its own name: checked before vLLM loads them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nvila.components.contracts.errors import ConfigError, DataError
from nvila.components.contracts.foreign import read_object, reading

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
"""Files of an adapter, by peft's names."""
RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""For which vLLM can make room."""
_TENSOR = re.compile(r"base_model\.model\.model\.layers\.(\d+)\.(?:self_attn|mlp)\.([a-z]+_proj)\.lora_([AB])\.weight")
_WANTED = {"peft_type": "LORA", "use_dora": False, "bias": "none", "modules_to_save": None, "fan_in_fan_out": False}
"""What vLLM can serve; keys that are not there have these values."""


def options(adapters: Mapping[str, str], served_name: str, model: Mapping[str, Any]) -> list[str]:
    """vLLM's options for adapters of the decoder.

    Args:
        adapters: by the name that requests call each, the folder of peft's format.
        served_name: what requests call the model itself.
        model: `config.json` of its serving folder.

    Raises:
        ConfigError: an adapter that cannot be served, or a name that is the model's.
        DataError: its files are damaged, or it is one of another model.
    """
    if not adapters:
        return []
    if served_name in adapters:
        raise ConfigError("this is the model's own name", where="endpoint.adapters", value=served_name)
    ranks = [_checked(Path(folder), model["text_config"]) for folder in adapters.values()]
    room = next(rank for rank in RANKS if rank >= max(ranks))
    named = [f"{name}={Path(folder).absolute()}" for name, folder in adapters.items()]
    return ["--enable-lora", "--max-loras", str(len(named)), "--max-lora-rank", str(room), "--lora-modules", *named]


def _checked(folder: Path, llm: Mapping[str, Any]) -> int:
    """The rank of an adapter whose every tensor fits a decoder of this configuration and is finite."""
    from nvila.components.model.checkpoint.tensorfile import read_header, read_tensor
    from nvila.components.model.checkpoint.weights import require_finite

    with reading(place := folder / CONFIG):
        config = read_object(place)
        rank = config["r"]
        if not isinstance(rank, int) or not 1 <= rank <= RANKS[-1]:
            raise ConfigError(f"an adapter's rank is 1 to {RANKS[-1]}", where=f"{place}: r", value=rank)
        for key, wanted in _WANTED.items():
            if (said := config.get(key, wanted)) != wanted and not (wanted is None and not said):
                raise ConfigError(
                    "vLLM does not serve such adapters",
                    where=f"{place}: {key}",
                    value=said,
                    do="Serve the model that it was merged into.",
                )
    sizes = _sizes(llm)
    stored = read_header(folder / WEIGHTS)
    for name, tensor in stored.items():
        found = _TENSOR.fullmatch(name)
        layer, linear, matrix = found.groups() if found else ("", "", "")
        if linear not in sizes or int(layer) >= int(llm["num_hidden_layers"]):
            raise DataError("no adapter of this model's decoder", where=str(folder / WEIGHTS), value=name)
        inside, outside = sizes[linear]
        if tensor.shape != ((rank, inside) if matrix == "A" else (outside, rank)):
            raise DataError(f"{name} does not fit the model", where=str(folder / WEIGHTS), value=list(tensor.shape))
        require_finite(read_tensor(tensor, name), name, str(folder / WEIGHTS))
    pairs = {name.replace(".lora_A.", ".lora_B.") for name in stored if ".lora_A." in name}
    if not stored or pairs != {name for name in stored if ".lora_B." in name}:
        raise DataError("an adapter is pairs of matrices, lora_A and lora_B", where=str(folder / WEIGHTS))
    return rank


def _sizes(llm: Mapping[str, Any]) -> dict[str, tuple[int, int]]:
    """Features into and out of each Linear of a decoder's block."""
    hidden, mlp, heads = (int(llm[key]) for key in ("hidden_size", "intermediate_size", "num_attention_heads"))
    head = int(llm.get("head_dim") or hidden // heads)
    queries, keys = heads * head, int(llm["num_key_value_heads"]) * head
    return {
        "q_proj": (hidden, queries),
        "k_proj": (hidden, keys),
        "v_proj": (hidden, keys),
        "o_proj": (queries, hidden),
        "gate_proj": (hidden, mlp),
        "up_proj": (hidden, mlp),
        "down_proj": (mlp, hidden),
    }
