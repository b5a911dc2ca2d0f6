"""Adapters beside the weights of a model's blocks: peft puts them in; the end of a stage merges them, tensor by tensor,
and writes them in peft's own format as well."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nvila.components.contracts.files import discard
from nvila.components.contracts.recipe.methods import Lora
from nvila.components.contracts.recipe.train import Stage
from nvila.components.train.zero import gathered_here

if TYPE_CHECKING:
    import torch
    from peft import LoraConfig
    from torch import nn

    from nvila.components.model.checkpoint.tensorfile import Later
    from nvila.components.model.nvila import NVILA

    Tensor = torch.Tensor | Later

ADAPTER = "adapter"
"""Folder beside `model/`: in it one for each part that has adapters, which peft loads onto that part."""
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
"""Files of such a folder, by peft's names."""
_NAME = "default"
"""Of an adapter that is alone, in the names of peft's modules."""
A, B, MAGNITUDE = (f"{inner}.{_NAME}.weight" for inner in ("lora_A", "lora_B", "lora_magnitude_vector"))


def inject(block: nn.Module, lora: Lora, *, dora: bool) -> None:
    """Put adapters beside all Linears of a block, in the type of its weights; all else of it is frozen."""
    from peft import inject_adapter_in_model
    from torch import nn

    dtype = next(parameter.dtype for parameter in block.parameters() if parameter.dtype.is_floating_point)
    linears = [name for name, module in block.named_modules() if isinstance(module, nn.Linear)]
    # Of DoRA the magnitudes begin as the lengths of the weights' rows.
    with gathered_here(block) if dora else nullcontext():
        inject_adapter_in_model(_config(linears, lora, dora=dora), block, _NAME)
    for name, parameter in block.named_parameters():
        learns = f".{_NAME}." in name
        parameter.requires_grad_(learns)
        if learns:
            parameter.data = parameter.data.to(dtype)  # peft makes float32 of what is half


def merged(model: NVILA, weights: Mapping[str, Tensor], base: Callable[[str], torch.Tensor]) -> dict[str, Tensor]:
    """The tensors of the model without adapters: what these say is in the weights.

    Args:
        model: with its adapters.
        weights: its tensors by name.
        base: gives a weight, by its name, as it was before it was quantized.
    """
    from nvila.components.model.checkpoint.tensorfile import Later

    plain = dict(weights)
    for name, layer, own in _adapted(model, weights):
        for inner in own:
            del plain[f"{name}.{inner}"]
        low = own["base_layer.weight"]
        before = partial(_whole, low) if low.dtype.is_floating_point else partial(base, f"{name}.weight")
        added = partial(_sum, before, own[A], own[B], own.get(MAGNITUDE), layer.scaling[_NAME])
        plain[f"{name}.weight"] = Later((layer.out_features, layer.in_features), own[A].dtype, added)
        if "base_layer.bias" in own:
            plain[f"{name}.bias"] = own["base_layer.bias"]
    return plain


def write(model: NVILA, weights: Mapping[str, Tensor], stage: Stage, folder: Path) -> None:
    """Write the adapters of each part that has some into a folder of its own, as `PeftModel.from_pretrained` reads it.

    Names are those of the part alone, as transformers loads it from the folder of that part.
    """
    from nvila.components.model.checkpoint.tensorfile import Whole, write_file

    discard(folder)
    for part in stage.adapted:
        (folder / part).mkdir(parents=True)
        tensors: dict[str, Tensor] = {}
        linears = []
        for name, _, own in _adapted(model, weights):
            if name.startswith(f"{part}."):
                linears.append(name.removeprefix(f"{part}."))
                for inner in (A, B, MAGNITUDE) if MAGNITUDE in own else (A, B):
                    tensors[f"base_model.model.{linears[-1]}.{inner.replace(f'.{_NAME}', '')}"] = own[inner]
        write_file(folder / part / WEIGHTS, [Whole(name, tensor) for name, tensor in sorted(tensors.items())])
        config = _config(linears, stage.lora, dora=stage.method(part) == "dora").to_dict()
        # Of the tower the layers above its feature have none; of the decoder all have.
        layers = {int(name.removeprefix("encoder.layers.").partition(".")[0]) for name in linears if part != "llm"}
        config |= {"inference_mode": True, "layers_to_transform": sorted(layers) or None}
        config |= {"task_type": "CAUSAL_LM"} if part == "llm" else {}
        content = json.dumps(config, indent=2, sort_keys=True, default=sorted)  # sets have no order
        (folder / part / CONFIG).write_text(content + "\n", encoding="utf-8")


def _config(linears: list[str], lora: Lora, *, dora: bool) -> LoraConfig:
    """Peft's words for adapters beside Linears of these names."""
    from peft import LoraConfig

    return LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=sorted({name.rpartition(".")[2] for name in linears}),
        use_dora=dora,
    )


def _adapted(model: nn.Module, weights: Mapping[str, Tensor]) -> Iterator[tuple[str, Any, dict[str, Tensor]]]:
    """Each Linear that has an adapter: its name, peft's module in its place, and that module's tensors."""
    from peft.tuners.lora import LoraLayer

    for name, module in model.named_modules():
        if isinstance(module, LoraLayer):
            own = {key: one for key, one in weights.items() if key.startswith(f"{name}.")}
            yield name, module, {key.removeprefix(f"{name}."): one for key, one in own.items()}


def _whole(tensor: Tensor) -> torch.Tensor:
    from nvila.components.model.checkpoint.tensorfile import Later

    return tensor.whole() if isinstance(tensor, Later) else tensor


def _sum(before: Callable[[], torch.Tensor], a: Tensor, b: Tensor, magnitude: Tensor | None, scaling: float) -> Any:
    """A weight (out, in) with its adapter in it, in the adapter's type, where the adapter lies."""
    import torch

    with torch.no_grad():
        first, second = _whole(a), _whole(b)
        weight = before().to(first.device)
        whole = weight.float() + scaling * (second.float() @ first.float())
        if magnitude is not None:
            # As in the forward pass, rounding included: against exact lengths a row would be another from the first.
            length = torch.linalg.norm(weight.to(first.dtype) + scaling * (second @ first), dim=1).to(first.dtype)
            whole *= (_whole(magnitude) / length).float()[:, None]
        return whole.to(first.dtype)
