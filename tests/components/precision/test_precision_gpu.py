"""FP8 products on a GPU, at the sizes of a 7B decoder, beside bf16's."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from nvila.components.contracts.recipe.train import Run
from nvila.components.precision.backends import problems

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU that torch can use"),
]
HIDDEN, MLP, ROWS = 3584, 18944, 1024
WITHIN = 0.08
"""Of the norm: E4M3 has three bits behind the point, E5M2 two."""


def _products(layer: nn.Linear, given: torch.Tensor, above: torch.Tensor) -> list[torch.Tensor]:
    """The product, and the gradients of the input and of the weight."""
    given = given.detach().requires_grad_()
    layer.zero_grad()
    made = layer(given)
    made.backward(above)
    assert given.grad is not None and layer.weight.grad is not None
    return [made.detach().float(), given.grad.float(), layer.weight.grad.float()]


@pytest.mark.parametrize("scaling", ["tensorwise", "rowwise"])
@pytest.mark.parametrize(("into", "out"), [(HIDDEN, MLP), (MLP, HIDDEN)], ids=["up", "down"])
def test_products_are_nearly_those_of_bf16(scaling: str, into: int, out: int) -> None:
    """A CPU imitates the kernels that only a GPU has; compiled, they could be others once more."""
    from nvila.components.precision import by_torchao

    run = Run.model_validate({"precision": "fp8-current", "fp8": {"scaling": scaling}})
    if said := problems(run):
        pytest.skip(said[0])
    torch.manual_seed(0)
    with torch.device("cuda"):
        model = nn.Sequential(nn.Linear(into, out, bias=False, dtype=torch.bfloat16))
        given, above = (torch.randn(ROWS, width, dtype=torch.bfloat16) for width in (into, out))
    wanted = _products(model[0], given, above)
    told = by_torchao.use(model, {"0": model[0]}, run, {"0": 1})
    assert told.scaling == scaling
    found = _products(model[0], given, above)
    for name, ours, plain in zip(("product", "input", "weight"), found, wanted, strict=True):
        off = float((ours - plain).norm() / plain.norm())
        assert 0 < off < WITHIN, f"gradient of the {name}" if name != "product" else name
