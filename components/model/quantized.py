"""Runs a compressed serving folder in plain torch: the oracle for vLLM's kernels, and the way without vLLM.

Weights are dequantized once; W8A8 Linears also round their inputs per token, as the int8 kernels do. Nothing here
needs compressed-tensors: the two packed formats are a few lines each.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from nvila.components.contracts.errors import DataError
from nvila.components.model.checkpoint import read_tensors
from nvila.components.model.config import ModelConfig
from nvila.components.model.nvila import NVILA, build_model
from nvila.components.model.serving import LLM, PROJECTOR, TOWER
from nvila.components.model.timetokens import check_time_tokens
from nvila.components.model.tokenizer import TokenIds, load_tokenizer

PER_INT32 = 8
"""4-bit values in one packed int32, the first in the lowest bits, each stored as value + 8."""


def load_quantized(folder: Path | str, dtype: torch.dtype = torch.float32) -> tuple[NVILA, Any]:
    """The model of a serving folder, quantized or not, in evaluation mode, with its tokenizer.

    Raises:
        DataError: a file or tensor is missing, or a quantization format is not known here.
    """
    folder = Path(folder)
    try:
        content = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError("not a serving folder", where=str(folder / "config.json")) from None
    tokenizer = load_tokenizer(folder)
    config = ModelConfig.from_json(content["nvila"], str(folder / "config.json"))
    tokens = TokenIds.of(tokenizer, config.video_texts)
    check_time_tokens(tokens.time, config.time_tokens)
    model = build_model(config, tokens)
    tensors = read_tensors(folder)
    for group in (content.get("quantization_config") or {}).get("config_groups", {}).values():
        _dequantize_group(model, tensors, group, str(folder))
    for prefix, part in ((TOWER, model.vision_tower), (LLM, model.llm), (PROJECTOR, model.mm_projector)):
        own = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
        missing, extra = part.load_state_dict(own, strict=False)
        # The tower's unused blocks and a tied lm_head are not stored.
        if part is not model.vision_tower:
            missing = [name for name in missing if name != "lm_head.weight"]
        else:
            missing = [name for name in missing if not name.startswith(("encoder.layers.", "post_layernorm"))]
        if missing or extra:
            raise DataError("tensors do not match the model", where=str(folder), value=sorted([*missing, *extra])[:5])
    model.llm.tie_weights()
    return model.to(dtype).eval(), tokenizer


def _dequantize_group(model: NVILA, tensors: dict[str, torch.Tensor], group: Mapping[str, Any], where: str) -> None:
    """Turn the packed tensors of one scheme into float weights, in place; W8A8 modules are exchanged."""
    form = group["format"]
    patterns = [target.removeprefix("re:") for target in group["targets"]]
    names = sorted({name.rpartition(".")[0] for name in tensors if name.endswith(".weight_scale")})
    for name in names:
        if not any(re.match(pattern, name) for pattern in patterns):
            continue
        scale = tensors.pop(f"{name}.weight_scale").float()
        if form == "pack-quantized":
            zero = tensors.pop(f"{name}.weight_zero_point", None)
            shape = tensors.pop(f"{name}.weight_shape").tolist()
            tensors[f"{name}.weight"] = unpack_w4(tensors.pop(f"{name}.weight_packed"), scale, zero, shape)
        elif form == "int-quantized":
            tensors[f"{name}.weight"] = tensors[f"{name}.weight"].float() * scale
            _round_inputs(model, name)
        else:
            raise DataError("unknown quantization format", where=where, value=form)


def unpack_w4(packed: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None, shape: list[int]) -> torch.Tensor:
    """(out, in / 8) int32 to (out, in) float: (q - zero) * scale, one scale per group of input features.

    Args:
        packed: eight 4-bit values in each int32.
        scale: (out, groups).
        zero: (out / 8, groups) int32 packed along the outputs, or None for symmetric weights.
        shape: [out, in].
    """
    values = _nibbles(packed, dim=1)[:, : shape[1]].float()
    groups = scale.shape[1]
    values = values.view(shape[0], groups, -1)
    if zero is not None:
        values = values - _nibbles(zero, dim=0)[: shape[0]].float()[:, :, None]
    return (values * scale[:, :, None]).view(shape)


def _nibbles(packed: torch.Tensor, dim: int) -> torch.Tensor:
    """Signed 4-bit values of each int32, laid out along `dim`."""
    shifts = torch.arange(0, 32, 4, dtype=torch.int32)
    values = ((packed.unsqueeze(-1) >> shifts) & 0xF).to(torch.int8) - 8  # (..., PER_INT32)
    if dim == 1:
        return values.flatten(1, 2)
    return values.movedim(-1, 1).flatten(0, 1)


class DynamicInt8Linear(nn.Linear):
    """A Linear whose inputs are rounded to int8 per token before the product, with a scale of max|x| / 127."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., in) to (..., out)."""
        scale = (x.float().abs().amax(-1, keepdim=True) / 127).clamp(min=1e-8)
        rounded = (x.float() / scale).round().clamp(-128, 127) * scale
        return F.linear(rounded.to(x.dtype), self.weight, self.bias)


def _round_inputs(model: NVILA, name: str) -> None:
    """Exchange the Linear of this serving name for one that rounds its inputs."""
    for prefix, part in ((TOWER, model.vision_tower), (LLM, model.llm)):
        if name.startswith(prefix):
            linear = part.get_submodule(name.removeprefix(prefix))
            linear.__class__ = DynamicInt8Linear
