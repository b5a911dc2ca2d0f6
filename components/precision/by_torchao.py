"""FP8 products by torchao: scales come from the tensors themselves, so nothing has to be kept between the passes.

On a GPU each Linear is compiled: with casts of their own the products are no faster than in bf16 (docs/fp8.md).
"""

from __future__ import annotations

import types
from collections.abc import Callable, Mapping
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, NamedTuple

from nvila.components.contracts.recipe.train import Run
from nvila.components.contracts.results.model import Fp8Products

if TYPE_CHECKING:
    import torch
    from torch import nn


def use(model: nn.Module, linears: Mapping[str, nn.Linear], run: Run, names: dict[str, int]) -> Fp8Products:
    """Put `Float8Linear` in the place of these Linears, with the same parameters; what was done, for the manifest."""
    import torch
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training
    from torchao.float8.float8_linear import Float8Linear

    config = Float8LinearConfig.from_recipe_name(run.fp8.scaling)
    convert_to_float8_training(model, config=config, module_filter_fn=lambda _, name: name in linears)
    forward = torch.compile(Float8Linear.forward, dynamic=True) if torch.cuda.is_available() else Float8Linear.forward
    for name in linears:
        module = model.get_submodule(name)
        module.forward = types.MethodType(_releasing(forward) if run.zero == 3 else forward, module)
    return Fp8Products(backend="torchao", version=version("torchao"), scaling=run.fp8.scaling, linears=names)


def _releasing(forward: Callable[..., Any]) -> Callable[..., Any]:
    """A forward that keeps no view of the weight for the backward pass.

    ZeRO 3 gathers a weight before a module and drops it after. torch's own Linear saves the parameter, which then
    is empty; torchao saves a transposed view, which would hold on to all that was gathered.
    """
    from torch.autograd.graph import saved_tensors_hooks

    def released(self: nn.Linear, given: torch.Tensor) -> torch.Tensor:
        weight = self.weight
        begin, storage = weight.storage_offset(), weight.untyped_storage().data_ptr()

        def pack(saved: torch.Tensor) -> torch.Tensor | _View:
            if saved.untyped_storage().data_ptr() != storage:
                return saved
            return _View(saved.shape, saved.stride(), saved.storage_offset() - begin)

        def unpack(kept: torch.Tensor | _View) -> torch.Tensor:
            if not isinstance(kept, _View):
                return kept
            return weight.detach().as_strided(kept.shape, kept.stride, weight.storage_offset() + kept.begin)

        with saved_tensors_hooks(pack, unpack):
            return forward(self, given)

    return released


class _View(NamedTuple):
    """Of a weight: where in it, once it is whole again."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    begin: Any
