"""Runs a compressed serving folder in plain torch: the oracle for vLLM's kernels, and the way without vLLM.

Weights are dequantized once; W8A8 Linears also round their inputs per token, as the int8 kernels do. Nothing here
needs compressed-tensors: the two packed formats are a few lines each.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from nvila.components.contracts.errors import DataError
from nvila.components.contracts.foreign import reading
from nvila.components.model.checkpoint.flat import open_checkpoint
from nvila.components.model.checkpoint.layouts import read_json, recognise
from nvila.components.model.checkpoint.native import buildable, unfilled_model
from nvila.components.model.checkpoint.serving import LLM, TOWER
from nvila.components.model.checkpoint.tensorfile import read_tensor
from nvila.components.model.checkpoint.weights import Source, check, fill, settle_head, wanted
from nvila.components.model.nvila import NVILA
from nvila.components.model.text.tokenizer import TokenIds, load_tokenizer
from nvila.components.model.vision.tower import drop_unused

PER_INT32 = 8
"""4-bit values in one packed int32, the first in the lowest bits, each stored as value + 8."""


def load_quantized(folder: Path | str, dtype: torch.dtype = torch.float32) -> tuple[NVILA, Any]:
    """The model of a serving folder, quantized or not, in evaluation mode, with its tokenizer.

    It has no tower blocks above the selected layer, since the folder has no weights for them.

    Raises:
        DataError: a file or tensor is missing or broken, or a quantization format is not known here.
    """
    folder = Path(folder)
    if not (folder / "config.json").is_file() or recognise(folder) != "serving":
        raise DataError("not a serving folder", where=str(folder / "config.json"))
    checkpoint, where = open_checkpoint(folder), str(folder)
    with reading(folder):
        tokenizer = load_tokenizer(checkpoint.tokenizer)
        tokens = TokenIds.of(tokenizer, checkpoint.config.video_texts)
        config, stored = settle_head(checkpoint.config, checkpoint.tensors, tokens.vocabulary, where)
        tensors: dict[str, Source] = {**stored}
        empty = buildable(config, tokens)
        drop_unused(empty.vision_tower, config.select_layer)
        rounded = [name for group in _groups(folder) for name in _dequantize_group(empty, tensors, group, where)]
        check(tensors, empty, where, says="tensors do not match the model")
    model = unfilled_model(config, tokens, dtype)
    drop_unused(model.vision_tower, config.select_layer)
    for name in rounded:
        _round_inputs(model, name)
    fill(model, tensors, where)
    return model.eval(), tokenizer


def _groups(folder: Path) -> list[tuple[str, list[str]]]:
    """Format and patterns of each quantization scheme."""
    path = folder / "config.json"
    quantization = read_json(path).get("quantization_config") or {}
    try:
        groups = quantization.get("config_groups", {}).values()
        found = [
            (str(group["format"]), [str(target).removeprefix("re:") for target in group["targets"]]) for group in groups
        ]
        for _, patterns in found:
            for pattern in patterns:
                re.compile(pattern)
        return found
    except (KeyError, TypeError, AttributeError, re.error) as error:
        raise DataError("not a quantization", where=f"{path}: quantization_config", value=str(error)) from None


def _dequantize_group(model: NVILA, tensors: dict[str, Source], group: tuple[str, list[str]], where: str) -> list[str]:
    """Exchange the packed tensors of one scheme for float weights, in place.

    Returns:
        The modules that round their inputs: those of W8A8.
    """
    form, patterns = group
    shapes = {name: tuple(tensor.shape) for name, tensor in wanted(model).items()}
    names = sorted({name.rpartition(".")[0] for name in tensors if name.endswith(".weight_scale")})
    rounded = []
    for name in names:
        if not any(re.match(pattern, name) for pattern in patterns):
            continue
        if form not in ("pack-quantized", "int-quantized"):
            raise DataError("unknown quantization format", where=where, value=form)
        try:
            weight = (_packed if form == "pack-quantized" else _int8)(tensors, name)
        except (KeyError, RuntimeError, ValueError, IndexError) as error:
            raise DataError(
                f"the quantized tensors of {name} do not fit together", where=where, value=str(error)
            ) from None
        if tuple(weight.shape) != shapes.get(f"{name}.weight"):
            raise DataError(
                f"{name} has another shape than the configuration says", where=where, value=tuple(weight.shape)
            )
        tensors[f"{name}.weight"] = weight
        if form == "int-quantized":
            rounded.append(name)
    return rounded


def _packed(tensors: dict[str, Source], name: str) -> torch.Tensor:
    scale, packed = _take(tensors, f"{name}.weight_scale").float(), _take(tensors, f"{name}.weight_packed", torch.int32)
    zero = _take(tensors, f"{name}.weight_zero_point", torch.int32) if f"{name}.weight_zero_point" in tensors else None
    return unpack_w4(packed, scale, zero, _take(tensors, f"{name}.weight_shape").tolist())


def _int8(tensors: dict[str, Source], name: str) -> torch.Tensor:
    weight = _take(tensors, f"{name}.weight", torch.int8).float()
    return weight * _take(tensors, f"{name}.weight_scale").float()


def _take(tensors: dict[str, Source], name: str, dtype: torch.dtype | None = None) -> torch.Tensor:
    source = tensors.pop(name)
    tensor = source if isinstance(source, torch.Tensor) else read_tensor(source, name)
    if dtype not in (None, tensor.dtype):
        raise ValueError(f"{name} is {tensor.dtype} instead of {dtype}")
    return tensor


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
