"""Which Linear gets which scheme: every one is accounted for, by name, before anything is quantized.

Names are those of the serving folder, which are also vLLM's, because compressed-tensors' regex targets are matched
against vLLM's names as they stand. The table becomes `module_map.json`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from nvila.components.contracts.errors import ConfigError, QuantizationError

if TYPE_CHECKING:
    from nvila.components.contracts.recipe.quantize import Scheme
    from nvila.components.model.nvila import NVILA

TOWER_PATTERN = r"^vision_tower\.vision_model\.encoder\.layers\.\d+\.(self_attn\.(q|k|v|out)_proj|mlp\.(fc1|fc2))$"
LLM_PATTERN = r"^llm\.model\.layers\.\d+\.(self_attn\.(q|k|v|o)_proj|mlp\.(gate|up|down)_proj)$"
PLAIN_PATTERN = r"^(mm_projector\..*|llm\.lm_head)$"
"""Stays bf16: small, and the first and last to touch every token."""
UNUSED = "unused"
"""Scheme of a Linear above the tower's selected block: not part of the checkpoint."""
PLAIN = "bf16"
PACK = 32
"""vLLM's 4-bit kernels want input features in multiples of this."""


@dataclass(frozen=True)
class Group:
    """One row of the plan."""

    name: str
    pattern: str
    scheme: str


def groups(settings: Scheme) -> list[Group]:
    """What the recipe asks for."""
    wanted = [
        Group("vision_tower", TOWER_PATTERN, settings.vision_tower),
        Group("llm", LLM_PATTERN, settings.llm),
    ]
    return [group for group in wanted if group.scheme != "none"]


def module_map(linears: Mapping[str, tuple[int, int] | None], settings: Scheme) -> dict[str, str]:
    """Scheme of every Linear.

    Args:
        linears: (out, in) features by serving name; None for one that the served model does not compute.
        settings: what the recipe asks for.

    Raises:
        QuantizationError: a pattern matches nothing, or a Linear is matched by no pattern.
        ConfigError: `group_size` does not divide the input features of a Linear.
    """
    asked = groups(settings)
    found: dict[str, str] = {}
    for name, shape in linears.items():
        scheme = next((group.scheme for group in asked if re.match(group.pattern, name)), None)
        known = any(re.match(pattern, name) for pattern in (TOWER_PATTERN, LLM_PATTERN, PLAIN_PATTERN))
        if shape is None:
            found[name] = UNUSED
        elif scheme is not None:
            found[name] = scheme
        elif known:
            found[name] = PLAIN
        else:
            raise QuantizationError(
                "no pattern says what to do with this Linear", where=name, do="Add it to components/quantize/scheme.py."
            )
    for group in asked:
        hit = [name for name in found if found[name] != UNUSED and re.match(group.pattern, name)]
        if not hit:
            raise QuantizationError(f"the pattern of {group.name} matches no Linear", where=group.pattern)
        if group.scheme == "W4A16":
            _check_group_size({name: linears[name] for name in hit}, settings.group_size)
    return found


def linears(model: NVILA) -> dict[str, tuple[int, int] | None]:
    """Every Linear of a model by serving name, for `module_map`."""
    from torch import nn

    from nvila.components.model.checkpoint.serving import LLM, PROJECTOR, TOWER, is_served

    found: dict[str, tuple[int, int] | None] = {}
    for prefix, part in ((TOWER, model.vision_tower), (PROJECTOR, model.mm_projector), (LLM, model.llm)):
        for name, module in part.named_modules():
            if isinstance(module, nn.Linear):
                served = part is not model.vision_tower or is_served(name, model.config)
                shape = (module.out_features, module.in_features) if served else None
                found[prefix + name.removeprefix("vision_model.")] = shape
    return found


def _check_group_size(shapes: Mapping[str, tuple[int, int] | None], group_size: int) -> None:
    for name, shape in shapes.items():
        features = shape[1] if shape else 0
        if features % group_size or features % PACK:
            fitting = [size for size in (32, 64, 128) if features % size == 0]
            raise ConfigError(
                f"group_size {group_size} does not divide the {features} input features of {name}"
                if features % group_size
                else f"the {features} input features of {name} are no multiple of {PACK}",
                where="quantize.group_size",
                value=group_size,
                do=f"Use one of {fitting}." if fitting else "Set quantize.llm to none for this model.",
            )
