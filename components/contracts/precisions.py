"""The precisions that training really runs in: what each keeps, by which the worker loads and the plan counts."""

from dataclasses import dataclass
from typing import Literal

from nvila.components.contracts.linears import FP8_DIVISOR

Precision = Literal["fp32", "bf16", "fp8-current", "fp8-delayed", "fp8-block"]
"""Those of FP8 differ in where a scale comes from: a tensor's own values, those before it, or each block's own."""


@dataclass(frozen=True)
class Kept:
    """How a precision keeps numbers."""

    weights: Literal["float32", "bfloat16"]
    """Type of the weights that the forward pass reads, of their gradients and of what is saved between the passes."""
    products: Literal["fp32", "bf16"]
    """In which the matrices are multiplied: the column of a GPU's speed in `nvila plan`."""
    fp8: bool = False
    """Whether large Linears of the decoder (`linears.why_not_fp8`) are multiplied in FP8 instead; weights stay."""

    @property
    def multiple(self) -> int:
        """Of what the decoder's positions in a pass must be one."""
        return FP8_DIVISOR if self.fp8 else 1

    @property
    def weight_bytes(self) -> int:
        """Of one weight."""
        return 4 if self.weights == "float32" else 2

    @property
    def master_bytes(self) -> int:
        """Of the fp32 copy of a weight that the optimizer then keeps."""
        return 0 if self.weights == "float32" else 4


PRECISIONS: dict[Precision, Kept] = {
    "fp32": Kept(weights="float32", products="fp32"),
    "bf16": Kept(weights="bfloat16", products="bf16"),
    "fp8-current": Kept(weights="bfloat16", products="bf16", fp8=True),
    "fp8-delayed": Kept(weights="bfloat16", products="bf16", fp8=True),
    "fp8-block": Kept(weights="bfloat16", products="bf16", fp8=True),
}
