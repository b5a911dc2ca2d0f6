"""Makes a loaded model trainable as its stage says: whole parts, layer norms alone, or adapters on frozen weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, get_args

from nvila.components.contracts.precisions import PRECISIONS
from nvila.components.contracts.recipe.methods import Part
from nvila.components.contracts.recipe.train import Run, Stage
from nvila.components.train.job import Job

if TYPE_CHECKING:
    import torch
    from bitsandbytes.nn import Params4bit
    from torch import nn

    from nvila.components.model.checkpoint.layouts import Checkpoint
    from nvila.components.model.checkpoint.weights import Receive
    from nvila.components.model.nvila import NVILA


def tune(model: NVILA, stage: Stage, *, seed: int = 0, four_bits: Mapping[str, Params4bit] | None = None) -> None:
    """Freeze what the stage does not train, and put adapters, and weights of four bits, in their places.

    Args:
        model: with the weights that the stage begins with.
        stage: which parts learn, and how.
        seed: of the adapters' first weights, which are the same in every process.
        four_bits: what was quantized while the model was loaded (`nf4.Quantizing`); without it, it is done here.
    """
    import torch

    torch.manual_seed(seed)
    for part in get_args(Part):
        whole = part in stage.trainable and stage.method(part) == "full"
        getattr(model, part).requires_grad_(whole)
    for part in stage.trainable:
        for name, block in blocks(model, part):
            _tune(block, part, name, stage, four_bits or {})


def loaded(checkpoint: Checkpoint, job: Job, device: str, receive: Receive | None) -> tuple[NVILA, Any]:
    """The model that a job trains, ready to be trained, and its tokenizer; `receive` takes its weights over."""
    from nvila.components.model.checkpoint.native import load_opened
    from nvila.components.model.device import use_float32_products
    from nvila.components.train.nf4 import Quantizing

    # As DeepSpeed would make it: it takes its fp32 copies from these, and fp32 weights of 15B fill most of a GPU.
    stage, dtype = job.stage, PRECISIONS[job.run.precision].weights
    quantizing = Quantizing(device, receive) if "qlora" in stage.methods.values() else None
    model, tokenizer = load_opened(checkpoint, dtype, device, quantizing or receive)
    tune(model, stage, seed=job.seed, four_bits=quantizing.found if quantizing else None)
    use_float32_products(model)  # of the adapters, too
    return model, tokenizer


def unquantized(checkpoint: Checkpoint, run: Run) -> Callable[[str], torch.Tensor]:
    """Gives a weight by its name as it was read, before it was quantized."""
    import torch

    from nvila.components.model.checkpoint.tensorfile import read_tensor

    dtype = getattr(torch, PRECISIONS[run.precision].weights)
    return lambda name: read_tensor(checkpoint.tensors[name], name).to(dtype)


def blocks(model: NVILA, part: Part) -> list[tuple[str, nn.Module]]:
    """The transformer blocks of a part by their names. Of the tower those that are computed: what lies above its
    feature gets no gradient."""
    from nvila.components.model.vision.tower import used_blocks

    if part == "llm":
        return [(f"llm.model.layers.{n}", block) for n, block in enumerate(model.llm.model.layers)]
    if part == "vision_tower":
        layers = model.vision_tower.encoder.layers
        used = layers[: used_blocks(len(layers), model.config.select_layer)]
        return [(f"vision_tower.encoder.layers.{n}", block) for n, block in enumerate(used)]
    return []


def _tune(block: nn.Module, part: Part, name: str, stage: Stage, four_bits: Mapping[str, Params4bit]) -> None:
    from torch import nn

    from nvila.components.train.adapters import inject
    from nvila.components.train.nf4 import quantize

    method = stage.method(part)
    if method == "layernorm":
        for norm in block.modules():
            if isinstance(norm, nn.LayerNorm):
                norm.requires_grad_(True)
    if method == "qlora":
        own = {key.removeprefix(f"{name}."): four for key, four in four_bits.items() if key.startswith(f"{name}.")}
        quantize(block, own)
    if part in stage.adapted:
        inject(block, stage.lora, dora=method == "dora")
