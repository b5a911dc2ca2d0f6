"""How long a Linear takes in bf16 and in FP8: measured on this machine, or as a bound for a GPU that is not here."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING, Any

from nvila.components.contracts.gpus import Gpu
from nvila.components.contracts.recipe.train import Run
from nvila.pipelines.planning.layers import Kind, Layer, Product

if TYPE_CHECKING:
    import torch

REPEATS, WARM = 5, 2
MOST_ON_A_CPU = 2048
"""Positions of a product that is measured on a CPU."""


@dataclass(frozen=True)
class Pair:
    """Seconds in both."""

    bf16: float
    fp8: float

    @property
    def gain(self) -> float:
        """How many times as fast FP8 is."""
        return self.bf16 / self.fp8


@dataclass(frozen=True)
class Times:
    """Of one Linear in a pass."""

    products: dict[Kind, Pair]
    """Of the products alone."""
    layer: Pair
    """Of all of them together, with the casts to FP8."""


def bound(layer: Layer, gpu: Gpu) -> Times:
    """The least that a GPU can take, by its maker's numbers: of each product the longer one of multiplying and moving;
    of the casts the moving, each tensor read once, and written by row and, for a gradient, by column.

    `gpu` has products in FP8.
    """
    assert gpu.fp8
    products = {one.kind: Pair(_roof(one, gpu.bf16, 2, gpu), _roof(one, gpu.fp8, 1, gpu)) for one in layer.products}
    out, into = layer.features
    kinds = products.keys()
    casts = layer.positions * into * (3 + ("weight gradient" in kinds)) + out * into * (3 + ("input gradient" in kinds))
    if len(kinds) > 1:
        casts += layer.positions * out * (2 + len(kinds) - 1)
    bf16, fp8 = (sum(getattr(pair, name) for pair in products.values()) for name in ("bf16", "fp8"))
    return Times(products, Pair(bf16, fp8 + casts / gpu.bytes_a_second))


def _roof(product: Product, speed: float, element: int, gpu: Gpu) -> float:
    """Seconds of a product whose operands have so many bytes a number; what comes out is in bf16."""
    rows, inner, columns = product.rows, product.inner, product.columns
    moved = element * (rows * inner + inner * columns) + 2 * rows * columns
    return max(product.operations / speed, moved / gpu.bytes_a_second)


def measured(layer: Layer, run: Run) -> Times:
    """On this machine's GPU, or its CPU: medians. The Linear is that of training, by the same library.

    Raises:
        ConfigError: this machine has no products in FP8.
    """
    import torch

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    products = {one.kind: _product(_limited(one, device), device) for one in layer.products}
    return Times(products, _layer(layer, run, device))


def _limited(product: Product, device: torch.device) -> Product:
    if device.type == "cuda":
        return product
    inner = "inner" if product.kind == "weight gradient" else "rows"
    return Product(**vars(product) | {inner: min(getattr(product, inner), MOST_ON_A_CPU)})


def _product(product: Product, device: torch.device) -> Pair:
    import torch

    kinds = torch.float8_e4m3fn, torch.float8_e4m3fn if product.kind == "forward" else torch.float8_e5m2
    left = torch.randn(product.rows, product.inner, device=device, dtype=torch.bfloat16)
    right = torch.randn(product.columns, product.inner, device=device, dtype=torch.bfloat16).t()
    one = torch.ones((), device=device)
    low = left.to(kinds[1]), right.to(kinds[0])

    def fp8() -> Any:
        return torch._scaled_mm(*low, scale_a=one, scale_b=one, out_dtype=torch.bfloat16)

    return Pair(_seconds(lambda: left @ right, device), _seconds(fp8, device))


def _layer(layer: Layer, run: Run, device: torch.device) -> Pair:
    import torch
    from torch import nn

    from nvila.components.precision.products import multiply

    kinds = {product.kind for product in layer.products}
    out, into = layer.features
    positions = layer.positions if device.type == "cuda" else min(layer.positions, MOST_ON_A_CPU)
    linear = nn.Linear(into, out, bias=False, dtype=torch.bfloat16, device=device)
    linear.weight.requires_grad_("weight gradient" in kinds)
    model = nn.Sequential(linear)
    given = torch.randn(positions, into, dtype=torch.bfloat16, device=device)
    given.requires_grad_("input gradient" in kinds)
    above = torch.randn(positions, out, dtype=torch.bfloat16, device=device)

    def work(forward: Callable[[], Any]) -> Callable[[], None]:
        def once() -> None:
            given.grad = linear.weight.grad = None
            made = forward()
            if made.requires_grad:
                made.backward(above)

        return once

    plain = _seconds(work(lambda: model(given)), device)
    products = multiply(model, {"0": linear}, run)

    def low() -> Any:
        with products.forward(True):
            return model(given)

    return Pair(plain, _seconds(work(low), device))


def _seconds(do: Callable[[], Any], device: torch.device) -> float:
    import torch

    found = []
    for at in range(WARM + REPEATS):
        began = time.perf_counter()
        do()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        if at >= WARM:
            found.append(time.perf_counter() - began)
    return median(found)
