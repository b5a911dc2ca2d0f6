"""Weights in four bits: NF4, the scales of its blocks quantized once more. What QLoRA's adapters lie beside.

A matrix is quantized as soon as it is read, so that of the decoder's blocks one at a time is whole.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from bitsandbytes.nn import Linear4bit, Params4bit

    from nvila.components.model.checkpoint.weights import Receive

BLOCKS = "llm.model.layers."
"""Where the matrices lie that are quantized: in the decoder's blocks. Embeddings and output layer stay as they are."""


class Quantizing:
    """Takes over a model's weights while it is loaded: the matrices of the decoder's blocks in four bits."""

    def __init__(self, device: str, receive: Receive | None = None) -> None:
        """`receive` takes all else."""
        self.found: dict[str, Params4bit] = {}
        """What was quantized, by name; the model's own tensors of these are empty."""
        self._device, self._receive = device, receive

    def __call__(self, name: str, tensor: torch.Tensor, read: Callable[[], None]) -> None:
        """As `weights.Receive`."""
        if name.startswith(BLOCKS) and tensor.dim() == 2:
            read()
            self.found[name] = _quantized(tensor, self._device)
            tensor.data = tensor.new_empty(0)
        elif self._receive:
            self._receive(name, tensor, read)
        else:
            read()


def quantize(block: torch.nn.Module, found: Mapping[str, Params4bit]) -> None:
    """Put the Linears of a block into four bits; `found` are those of its weights, by name, that already are."""
    from torch import nn

    from nvila.components.model.device import product_dtype

    for name, linear in [(name, m) for name, m in block.named_modules() if isinstance(m, nn.Linear)]:
        weight = linear.weight
        four = found.get(f"{name}.weight")
        if four is None:
            four = _quantized(weight, weight.device)
        made = _linear()(0, 0, bias=False, compute_dtype=product_dtype(weight.dtype, four.device))
        made.in_features, made.out_features = linear.in_features, linear.out_features
        made.weight, made.bias, made.quant_state = four, linear.bias, four.quant_state
        block.set_submodule(name, made)


def _quantized(weight: torch.Tensor, device: str | torch.device) -> Params4bit:
    import torch
    from bitsandbytes.nn import Params4bit

    whole: Any = Params4bit(weight.detach(), requires_grad=False, compress_statistics=True, quant_type="nf4")
    return whole.to(torch.device(device))  # type: ignore[no-any-return]


@cache
def _linear() -> type[Linear4bit]:
    from bitsandbytes import matmul_4bit
    from bitsandbytes.nn import Linear4bit
    from torch import nn

    class Linear(Linear4bit):  # type: ignore[misc]
        """Bitsandbytes' own, which changes the type of its bias for good, and saves scales beside the weights."""

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            wide: Any = self.compute_dtype
            bias = None if self.bias is None else self.bias.to(wide)
            state: Any = self.quant_state
            return matmul_4bit(x.to(wide), self.weight, bias=bias, quant_state=state).to(x.dtype)

        def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
            nn.Module._save_to_state_dict(self, destination, prefix, keep_vars)

    return Linear
