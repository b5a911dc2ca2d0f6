"""Which ways of training go together: one table of rules, by which recipes are checked, and which `nvila plan --matrix`
and the documents show."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal, get_args

from nvila.components.contracts.precisions import PRECISIONS, Precision
from nvila.components.contracts.recipe.methods import METHODS, Method

Zero = Literal[0, 1, 2, 3]
Offload = Literal["none", "cpu"]
Packing = Literal["auto", "padded", "grouped", "packed"]
Learning = Method | Literal["frozen"]
"""How a part learns, or that it does not."""


@dataclass(frozen=True)
class Cell:
    """One way to train a stage; the projector learns in full or not at all, which matters to none of the others."""

    zero: Zero
    precision: Precision
    vision_tower: Learning
    llm: Learning
    offload: Offload
    packing: Packing

    @classmethod
    def of(
        cls, learning: Mapping[str, Method], zero: Zero, precision: Precision, offload: Offload, packing: Packing
    ) -> Cell:
        """Of a stage whose trainable parts learn so."""
        return cls(
            zero, precision, learning.get("vision_tower", "frozen"), learning.get("llm", "frozen"), offload, packing
        )


@dataclass(frozen=True)
class Rule:
    """What does not go together, and why."""

    option: str
    """The one that is best changed; of a stage if it begins with `stages.*.`"""
    refuses: Callable[[Cell], bool]
    why: str


RULES = (
    Rule(
        "offload",
        lambda cell: cell.offload == "cpu" and cell.zero < 2,
        "offload needs zero 2 or 3: without, there are no shares of optimizer states that could lie elsewhere",
    ),
    Rule(
        "stages.*.methods.llm",
        lambda cell: cell.llm == "qlora" and PRECISIONS[cell.precision].fp8,
        "qlora keeps the decoder's matrices in four bits: none is left that FP8 could multiply; say bf16, or lora",
    ),
)


def refusals(cell: Cell) -> list[Rule]:
    """The rules that a way breaks; none where it is allowed."""
    return [rule for rule in RULES if rule.refuses(cell)]


def axes() -> dict[str, Collection[object]]:
    """Every option of a cell."""
    return {
        "zero": get_args(Zero),
        "precision": get_args(Precision),
        "vision_tower": ("frozen", *METHODS["vision_tower"]),
        "llm": ("frozen", *METHODS["llm"]),
        "offload": get_args(Offload),
        "packing": [packing for packing in get_args(Packing) if packing != "auto"],
    }


def cells() -> Iterator[Cell]:
    """All of them."""
    return itertools.starmap(Cell, itertools.product(*axes().values()))  # type: ignore[arg-type]
