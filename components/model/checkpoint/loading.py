"""One door to every checkpoint: a place and any known layout in, a model and its tokenizer out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nvila.components.contracts.errors import ConfigError, DataError
from nvila.components.data.fetch import fetch
from nvila.components.model.checkpoint.flat import open_checkpoint
from nvila.components.model.checkpoint.layouts import checkpoint_root, recognise
from nvila.components.model.checkpoint.native import DTYPES, load_native, load_opened
from nvila.components.model.checkpoint.quantized import load_quantized
from nvila.components.model.nvila import NVILA


def load(place: Path | str, *, dtype: str = "float32", device: str = "cpu") -> tuple[NVILA, Any]:
    """Read a checkpoint of any layout, in evaluation mode, with its tokenizer.

    Args:
        place: a folder, `s3://bucket/prefix` or `hf://id@revision`.
        dtype: float32, bfloat16 or float16.
        device: where to.

    Raises:
        ConfigError: unknown dtype, or a model that is not computed here.
        DataError: it cannot be fetched, has no known layout, or is broken.
    """
    folder = checkpoint_root(fetch(str(place)))
    layout = recognise(folder)
    if layout == "serving":
        if dtype not in DTYPES:
            raise ConfigError("unknown dtype", where="dtype", value=dtype, do=f"Use one of {', '.join(DTYPES)}")
        model, tokenizer = load_quantized(folder, DTYPES[dtype])
        return model.to(device), tokenizer
    return (load_flat if layout == "hf" else load_native)(folder, dtype=dtype, device=device)


def load_flat(folder: Path | str, *, dtype: str = "float32", device: str = "cpu") -> tuple[NVILA, Any]:
    """Read a checkpoint of the flat layout (published as NVILA-8B-hf), as `load_native`."""
    checkpoint = open_checkpoint(folder)
    if checkpoint.layout != "hf":
        raise DataError("not of the layout hf", where=str(folder), value=checkpoint.layout)
    return load_opened(checkpoint, dtype, device)
