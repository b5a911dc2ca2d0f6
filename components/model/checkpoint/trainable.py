"""Which checkpoints training can go on from: whole ones that are not quantized, of any layout but the served one."""

from __future__ import annotations

from pathlib import Path

from nvila.components.contracts.errors import ConfigError
from nvila.components.contracts.foreign import reading
from nvila.components.model.checkpoint.flat import open_checkpoint, read_hf_config
from nvila.components.model.checkpoint.layouts import (
    Checkpoint,
    checkpoint_root,
    part_folders,
    read_json,
    read_native_config,
    recognise,
)

OPTION = "model.base.model"


def open_trainable(folder: Path) -> Checkpoint:
    """Describe the checkpoint; no tensor is read.

    Raises:
        ConfigError: it is quantized or in serving form, which is what a run registers and serves; or this model does
            not compute it.
        DataError: no checkpoint, or files are missing or broken.
    """
    _refuse_served(checkpoint_root(folder))
    checkpoint = open_checkpoint(folder)
    if any(name.endswith((".weight_scale", ".weight_packed")) for name in checkpoint.tensors):
        raise _refusal("a quantized model", folder)
    return checkpoint


def read_trainable(folder: Path) -> Checkpoint:
    """The same by the files that describe it alone, as far as they tell; without tensors."""
    with reading(folder):
        folder = checkpoint_root(folder)
        _refuse_served(folder)
        if (layout := recognise(folder)) == "hf":
            return Checkpoint(folder, layout, read_hf_config(folder), folder, {})
        return Checkpoint(folder, layout, read_native_config(folder), part_folders(folder)["llm"], {})


def _refuse_served(folder: Path) -> None:
    if "quantization_config" in read_json(folder / "config.json"):
        raise _refusal("a quantized model", folder)
    if recognise(folder) == "serving":
        raise _refusal("a serving folder, which lacks blocks of the tower,", folder)


def _refusal(what: str, folder: Path) -> ConfigError:
    return ConfigError(
        f"{what} cannot be trained",
        where=OPTION,
        value=str(folder),
        do="Name the model that it was made from (`weights` in the summary.json of its run), or its version in the "
        "registry, NAME/NUMBER, which leads there.",
    )
