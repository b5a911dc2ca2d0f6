"""Which library multiplies in FP8 on this machine, or why none can: said before anything long starts."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Literal

from nvila.components.contracts.errors import ConfigError
from nvila.components.contracts.precisions import PRECISIONS
from nvila.components.contracts.recipe.train import Run

Backend = Literal["torchao", "transformer-engine"]
FIRST_WITH_FP8 = (8, 9)
"""Compute capability of the first NVIDIA GPUs that multiply in FP8: Ada, then Hopper."""


def backend(run: Run) -> Backend:
    """Of a run in an FP8 precision: Transformer Engine where it is installed with a GPU, else torchao, which has
    fp8-current alone.

    Raises:
        ConfigError: neither can do it here.
    """
    import torch

    gpu = torch.cuda.is_available()
    if gpu and (found := torch.cuda.get_device_capability()) < FIRST_WITH_FP8:
        raise ConfigError(
            f"{torch.cuda.get_device_name()} has no products in FP8 (compute capability {found[0]}.{found[1]}, from "
            f"{FIRST_WITH_FP8[0]}.{FIRST_WITH_FP8[1]} on they do)",
            where="train.precision",
            value=run.precision,
            do="Say bf16, or train on an H100 or newer",
        )
    installed = gpu and find_spec("transformer_engine") is not None
    if run.precision == "fp8-current" and (run.fp8.scaling == "rowwise" or not installed):
        return "torchao"
    if installed:
        return "transformer-engine"
    lacks = "Transformer Engine is not installed here" if gpu else "there is no GPU here"
    raise ConfigError(
        f"only Transformer Engine does {run.precision}, and {lacks}",
        where="train.precision",
        value=run.precision,
        do="Train in the image `train` (docs/images.md), or say fp8-current",
    )


def problems(run: Run) -> list[str]:
    """What a training step of this run would be refused for on this machine."""
    if not PRECISIONS[run.precision].fp8:
        return []
    try:
        backend(run)
    except ConfigError as error:
        return [str(error)]
    return []
