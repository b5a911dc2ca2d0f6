"""What an FP8 precision takes of a stage: which Linears, how much of the work, and what memory that spares or costs.

Memory is that of Transformer Engine, which trains in FP8 on GPUs, or of torchao where the recipe asks for its scaling.
"""

from __future__ import annotations

from nvila.components.contracts.linears import fp8_linears
from nvila.components.contracts.precisions import PRECISIONS
from nvila.components.contracts.recipe.train import Run, Stage
from nvila.components.model.shape import Shape
from nvila.components.precision.products import linears_of

ALONE = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("mlp.gate_proj", "mlp.up_proj"),
    ("mlp.down_proj",),
)
"""Linears of a block by the tensor that they read, which is kept for them alone. That of attention's output layer is
kept by attention in any case."""


def taken(shape: Shape, run: Run) -> dict[str, tuple[int, int]]:
    """Output and input features of the Linears of a block that FP8 takes, by name; none in another precision."""
    if not PRECISIONS[run.precision].fp8:
        return {}
    return fp8_linears(linears_of(shape.config.llm), run.fp8.min_features)


def operations(shape: Shape, stage: Stage, run: Run, tokens: float) -> float:
    """Of a stage's floating-point operations those in FP8, for so many tokens of the decoder."""
    each = sum(out * into for out, into in taken(shape, run).values()) * int(shape.config.llm["num_hidden_layers"])
    return 2 * each * tokens * (3 if stage.learning.get("llm") == "full" else 2)


def weight_bytes(shape: Shape, run: Run, *, recompute: bool) -> int:
    """Of the weights' copies in FP8, by row and by column, from the forward to the backward pass, or until they change:
    under ZeRO 3 with checkpointing those of one block. torchao makes them anew each time."""
    if _by_torchao(run):
        return 0
    each = 2 * sum(out * into for out, into in taken(shape, run).values())
    return each if run.zero == 3 and recompute else each * int(shape.config.llm["num_hidden_layers"])


def input_bytes(shape: Shape, run: Run, element: int, *, learns: bool) -> int:
    """By how much a position of a block keeps more of its Linears' inputs than without FP8, or less.

    Args:
        shape: of the model.
        run: its precision, and what FP8 takes.
        element: bytes of a number in bf16.
        learns: whether the decoder does. Where it is frozen, bf16 and Transformer Engine keep no input; torchao keeps
            those that nothing else does all the same.
    """
    linears, mine = linears_of(shape.config.llm), taken(shape, run)
    if _by_torchao(run):
        kept = [names[0] for names in ALONE if not learns and any(name in mine for name in names)]
        return element * sum(linears[name][1] for name in kept)
    if not learns:
        return 0
    spared = [names[0] for names in ALONE if all(name in mine for name in names)]
    return sum(into for _, into in mine.values()) - element * sum(linears[name][1] for name in spared)


def _by_torchao(run: Run) -> bool:
    return run.fp8.scaling == "rowwise"
