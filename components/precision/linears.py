"""The Linears of a model that FP8 takes, by the rule of `contracts.linears`."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from typing import TYPE_CHECKING

from nvila.components.contracts.linears import why_not_fp8

if TYPE_CHECKING:
    from torch import nn

_INSIDE_A_BLOCK = re.compile(r"llm\.model\.layers\.\d+\.(?!.*\blora_)")
"""Of the decoder: what adapters keep beside a Linear is small, and FP8 would lose it; their `base_layer` is taken."""


def eligible(model: nn.Module, min_features: int) -> dict[str, nn.Linear]:
    """Those Linears by their names in the model; one whose weights are quantized already is none."""
    from nvila.components.model.device import is_plain_linear

    return {
        name: module
        for name, module in model.named_modules()
        if _INSIDE_A_BLOCK.match(name)
        and is_plain_linear(module)
        and why_not_fp8((module.out_features, module.in_features), min_features) is None
    }


def compactly(names: Iterable[str]) -> dict[str, int]:
    """How many have each name, the number of the block left out."""
    return dict(Counter(map(without_number, names)))


def without_number(name: str) -> str:
    """A module's name with `*` for the number of its block."""
    return re.sub(r"(?<=(?:model|coder)\.layers\.)\d+", "*", name)
