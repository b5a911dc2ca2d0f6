"""FP8 beside bf16 in blocks of NVILA-8B's decoder: with the same batch, and each with the largest that fits."""

from __future__ import annotations

from collections.abc import Iterator

from gpu_rows.steps import most, setting, steps

from nvila.components.precision.backends import backend

LAYERS = 4
STAGE = {"trainable": ["llm"], "gradient_checkpointing": False}
EQUAL, FREED = 1.2, 1.4
Row = tuple[str, str, float, float, str, float | None]


def rows() -> Iterator[Row]:
    """Of optimizer steps on rows of 8,192 positions."""
    settings = [setting("nvila-8b", 3, LAYERS, STAGE, {"precision": name}) for name in ("bf16", "fp8-current")]
    work = f"position of {LAYERS} decoder blocks of 7B widths, fp8-current by {backend(settings[1][2])}"
    one = [steps(*each, 1, video=False) for each in settings]
    largest = [steps(*each, most(*each, video=False), video=False) for each in settings]
    for how, taken, wanted in (("the same batch", one, EQUAL), ("the largest batch", largest, FREED)):
        counts = " and ".join(f"{each.positions:,}" for each in taken)
        bf16, fp8 = (1e6 * each.seconds / each.positions for each in taken)
        yield f"{work}, {how} ({counts} positions)", "us", bf16, fp8, "bf16", wanted
