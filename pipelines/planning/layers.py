"""The Linears of a model in a stage: how large they are, what is multiplied for them, and which FP8 takes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from nvila.components.contracts.linears import FP8_DIVISOR, why_not_fp8
from nvila.components.contracts.recipe.train import Part, Run, Stage
from nvila.components.model.shape import PARTS, Shape
from nvila.components.model.work import Load, operations
from nvila.components.precision.linears import without_number
from nvila.pipelines.planning.memory import MicroBatch

Kind = Literal["forward", "input gradient", "weight gradient"]
DECODER = "llm.model.layers.*."


@dataclass(frozen=True)
class Product:
    """One product of matrices: rows x inner with inner x columns."""

    kind: Kind
    rows: int
    inner: int
    columns: int

    @property
    def operations(self) -> int:
        """In floating point."""
        return 2 * self.rows * self.inner * self.columns


@dataclass(frozen=True)
class Layer:
    """Linears of one name and size, `*` in it for the number of a block."""

    name: str
    count: int
    """How many there are."""
    features: tuple[int, int]
    """Output and input."""
    positions: int
    """Rows of its input in a micro batch."""
    products: tuple[Product, ...]
    """What is multiplied in a pass, forward and backward."""
    stays: str | None
    """Why it stays in bf16; None where FP8 takes it."""

    @property
    def operations(self) -> int:
        """Of all of them."""
        return self.count * sum(product.operations for product in self.products)


def layers(shape: Shape, stage: Stage, run: Run, batch: MicroBatch) -> list[Layer]:
    """Of a stage's micro batch: in the order of the model, those of each name together."""
    from torch import nn

    from nvila.components.model.nvila import empty_model

    found: dict[tuple[str, int, int], int] = {}
    for name, module in empty_model(shape.config).named_modules():
        if isinstance(module, nn.Linear) and _computed(name, shape):
            key = (without_number(name), module.out_features, module.in_features)
            found[key] = found.get(key, 0) + 1
    made = []
    for (name, out, into), count in found.items():
        part: Part = next(part for part in get_args(Part) if name.startswith(part))
        positions = _positions(name, part, batch)
        made.append(
            Layer(
                name=name,
                count=count,
                features=(out, into),
                positions=positions,
                products=_products(out, into, positions, part, stage),
                stays=_stays(name, (out, into), run),
            )
        )
    return sorted(made, key=lambda layer: [layer.name.startswith(part) for part in PARTS], reverse=True)


def whole(shape: Shape, stage: Stage, batch: MicroBatch) -> float:
    """Operations of the whole pass over a micro batch, attention and the embedding of patches included."""
    positions = batch.rows * batch.length
    load = Load(
        tiles=batch.tower_tokens / shape.tower_tokens,
        projected=batch.projected,
        positions=positions,
        pairs=positions * batch.length / 2,
        predicted=batch.supervised,
    )
    return operations(shape, stage, load)


def _computed(name: str, shape: Shape) -> bool:
    """Whether a pass reaches it: no feature needs the tower's last blocks."""
    before, _, number = name.partition("vision_tower.encoder.layers.")
    return bool(before) or not number or int(number.split(".")[0]) < shape.tower_blocks


def _positions(name: str, part: Part, batch: MicroBatch) -> int:
    if part == "vision_tower":
        found = batch.tower_tokens
    elif part == "mm_projector":
        found = batch.projected
    else:
        found = batch.rows * batch.length if name.startswith(DECODER) else batch.supervised
    return -(-found // FP8_DIVISOR) * FP8_DIVISOR


def _products(out: int, into: int, positions: int, part: Part, stage: Stage) -> tuple[Product, ...]:
    """Gradients of weights where all of them learn; of inputs where something before, or a part of it, does."""
    forward = Product("forward", positions, into, out)
    inputs, weights = Product("input gradient", positions, out, into), Product("weight gradient", out, positions, into)
    through = any(one in stage.trainable for one in PARTS[: PARTS.index(part) + 1])
    full = stage.learning.get(part) == "full"
    return (forward, *((inputs,) if through else ()), *((weights,) if full else ()))


def _stays(name: str, features: tuple[int, int], run: Run) -> str | None:
    if not name.startswith(DECODER):
        return "outside the decoder's blocks"
    return why_not_fp8(features, run.fp8.min_features)
