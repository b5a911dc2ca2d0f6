"""Runs llm-compressor on one part of the model and packs the result as compressed-tensors stores it.

Quantized modules keep their float weights until packed; packing reads the scales that the modifier has left on them.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from nvila.components.quantize.scheme import Group

if TYPE_CHECKING:
    from nvila.components.contracts.recipe.quantize import Scheme

FORMATS = {"W8A8": "int-quantized", "W4A16": "pack-quantized"}


def config_group(group: Group, settings: Scheme) -> dict[str, Any]:
    """One `config_groups` entry of compressed-tensors, its target written against serving names."""
    entry: dict[str, Any] = {"targets": [f"re:{group.pattern}"], "format": FORMATS[group.scheme]}
    if group.scheme == "W8A8":
        entry["weights"] = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel", "dynamic": False}
        entry["input_activations"] = {
            "num_bits": 8,
            "type": "int",
            "symmetric": True,
            "strategy": "token",
            "dynamic": True,
        }
    else:
        entry["weights"] = {
            "num_bits": 4,
            "type": "int",
            "symmetric": settings.method != "awq",  # AWQ's own kernels and accuracy figures are with zero points
            "strategy": "group",
            "group_size": settings.group_size,
            "dynamic": False,
        }
    return entry


def quantize_part(
    part: nn.Module,
    prefix: str,
    names: Sequence[str],
    group: Group,
    settings: Scheme,
    batches: Sequence[Mapping[str, torch.Tensor]],
    checkpoint: Path,
) -> dict[str, torch.Tensor]:
    """Quantize some Linears of one part.

    Args:
        part: the tower or the decoder, a transformers model; its weights change.
        prefix: what its module names lack to be serving names.
        names: serving names of the Linears.
        group: their scheme.
        settings: method and group size.
        batches: keyword arguments of `part` for calibration; empty where the method needs none.
        checkpoint: the part's folder in the native checkpoint; llm-compressor looks at its config.json.

    Returns:
        Compressed tensors by serving name. The plain `weight` of these Linears is not among them where the format has
        its own name for it.
    """
    from compressed_tensors.compressors.base import compress_module

    inner = [name.removeprefix(prefix) for name in names]
    scheme = {**config_group(group, settings), "targets": inner}
    with _quiet():
        _oneshot(part, _modifiers(group, settings, scheme), batches, checkpoint)
    packed: dict[str, torch.Tensor] = {}
    for name in inner:
        module = part.get_submodule(name)
        compress_module(module)
        packed |= {f"{prefix}{name}.{key}": _stored(key, tensor, group) for key, tensor in module.state_dict().items()}
    return packed


def _stored(key: str, tensor: torch.Tensor, group: Group) -> torch.Tensor:
    """bf16 as everything else, but vLLM's int8 kernels take their scales in float32."""
    exact = not tensor.is_floating_point() or (group.scheme == "W8A8" and key == "weight_scale")
    return tensor if exact else tensor.to(torch.bfloat16)


def quantization_config(groups: Sequence[Group], settings: Scheme, ignore: Sequence[str]) -> dict[str, Any]:
    """`quantization_config` of the checkpoint; `ignore` names the Linears that stay plain."""
    entries = {f"group_{i}": config_group(group, settings) for i, group in enumerate(groups)}
    formats = {entry["format"] for entry in entries.values()}
    return {
        "quant_method": "compressed-tensors",
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "config_groups": entries,
        "ignore": sorted(ignore),
        "kv_cache_scheme": None,
    }


def _modifiers(group: Group, settings: Scheme, scheme: dict[str, Any]) -> list[Any]:
    from llmcompressor.modifiers.gptq import GPTQModifier
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from llmcompressor.modifiers.transform.awq import AWQModifier

    groups = {"group_0": scheme}
    if group.scheme == "W8A8" or settings.method == "rtn":
        return [QuantizationModifier(config_groups=groups)]
    if settings.method == "gptq":
        return [GPTQModifier(config_groups=groups)]
    return [AWQModifier(), QuantizationModifier(config_groups=groups)]


def _oneshot(part: Any, modifiers: list[Any], batches: Sequence[Mapping[str, torch.Tensor]], checkpoint: Path) -> None:
    from llmcompressor import oneshot
    from torch.utils.data import DataLoader

    loader: Any = DataLoader(list(batches), batch_size=None) if batches else None  # type: ignore[arg-type]
    part.config.name_or_path = str(checkpoint)
    unneeded: Any = object()  # without a processor llm-compressor would try to read one from the checkpoint
    with _host_memory():
        oneshot(
            model=part,
            processor=unneeded,
            recipe=modifiers,
            dataset=loader,
            num_calibration_samples=len(batches),
            pipeline="sequential" if batches else "datafree",
        )


@contextlib.contextmanager
def _host_memory() -> Iterator[None]:
    """Without an accelerator `pin_memory` raises, and llm-compressor's activation cache calls it unasked."""
    if torch.accelerator.is_available():
        yield
        return
    original = torch.Tensor.pin_memory
    torch.Tensor.pin_memory = lambda self, *_: self  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        torch.Tensor.pin_memory = original  # type: ignore[method-assign]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """llm-compressor's log and bars say nothing that ours do not."""
    import llmcompressor  # noqa: F401 - switches its logging on when imported
    from loguru import logger

    names = ("llmcompressor", "compressed_tensors")
    for name in names:
        logger.disable(name)
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        for name in names:
            logger.enable(name)
