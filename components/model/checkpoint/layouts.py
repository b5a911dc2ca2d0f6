"""The layouts a checkpoint may have, and the one that is trained, read without loading a tensor.

native: three folders, as trained. vila: the same with a configuration for remote code. hf: one flat folder with
`text_config` and `vision_config`. serving: our own flat folder for vLLM. No code of a checkpoint is ever run. The
flat ones are read in `flat`, which training does not reach.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from nvila.components.contracts.errors import DataError
from nvila.components.contracts.foreign import read_object, reading
from nvila.components.model.checkpoint.bounds import check_bounds
from nvila.components.model.checkpoint.shards import SINGLE, read_folder, require_nothing_beside
from nvila.components.model.checkpoint.tensorfile import Stored
from nvila.components.model.checkpoint.weights import canonical
from nvila.components.model.config import refusals
from nvila.components.model.config.config import ModelConfig
from nvila.components.model.config.refusals import check_size, refuse

Layout = Literal["native", "vila", "hf", "serving"]
LAYOUTS: tuple[Layout, ...] = ("native", "vila", "hf", "serving")
PARTS = ("llm", "vision_tower", "mm_projector")
PROCESSOR = "preprocessor_config.json"
HF_KINDS = {"nvila": ("dynamic_s2", "mlp_downsample"), "nvila_lite": ("dynamic", "mlp_downsample_3x3_fix")}
"""`model_type` of the flat layout: the vision mode and the projector that its readers build."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on this machine, described but not loaded."""

    folder: Path
    layout: Layout
    config: ModelConfig
    tokenizer: Path
    tensors: dict[str, Stored]
    """By `llm.*`, `vision_tower.vision_model.*` and `mm_projector.layers.*`, whatever the files call them; what no
    NVILA computes is left out."""
    new_tokens: int = 0
    """Time tokens that neither its files nor its tensors have yet."""

    def load_tokenizer(self) -> Any:
        """Its tokenizer with the media markers, and with the new tokens in front of these.

        Raises:
            DataError, ConfigError: as of `text.tokenizer.load_tokenizer`.
        """
        from nvila.components.model.text.tokenizer import load_tokenizer

        return load_tokenizer(self.tokenizer, self.folder, self.new_tokens)


def open_native(folder: Path | str) -> Checkpoint:
    """Describe a checkpoint in three folders.

    Raises:
        DataError: none, or files are missing or broken.
        ConfigError: a configuration that this model does not compute.
    """
    with reading(folder):
        folder = checkpoint_root(Path(folder))
        layout = recognise(folder)
        if layout not in ("native", "vila"):
            raise DataError("not of the layout native", where=str(folder), value=layout)
        folders, config = part_folders(folder), read_native_config(folder)
        tensors = {f"{part}.{name}": t for part in PARTS for name, t in _part(folders[part], part, config).items()}
        if folder not in folders.values():
            require_nothing_beside(folder, [])
        return described(folder, layout, config, folders["llm"], tensors)


def described(
    folder: Path, layout: Layout, config: ModelConfig, tokenizer: Path, tensors: Mapping[str, Stored]
) -> Checkpoint:
    """The checkpoint whose files hold `tensors`, whatever they call them."""
    named = canonical(tensors, config.projector, str(folder))
    with reading(folder / "config.json"):
        check_bounds(config, named, cut=layout == "serving")
    _check_vocabulary(config, tokenizer)
    return Checkpoint(folder, layout, config, tokenizer, named)


def _part(folder: Path, part: str, config: ModelConfig) -> dict[str, Stored]:
    """The tensors of a part; the identity has none, and need not have a file."""
    if part == "mm_projector" and config.projector == "identity" and not (folder / SINGLE).exists():
        require_nothing_beside(folder, [])
        return {}
    return read_folder(folder)


def checkpoint_root(folder: Path) -> Path:
    """`folder`, or its `model` where the checkpoint lies in there, as in the reference's loader."""
    inner = folder / "model"
    return inner if not (folder / "config.json").is_file() and (inner / "config.json").is_file() else folder


def recognise(folder: Path) -> Layout:
    """Which layout a folder has, by its `config.json` alone.

    Raises:
        DataError: none of them.
    """
    content = read_json(folder / "config.json")
    kind = str(content.get("model_type"))
    if "nvila" in content and "text_config" in content:
        return "serving"
    if kind in HF_KINDS and "text_config" in content and "vision_config" in content:
        return "hf"
    if kind == "vila" or "VILAForCausalLM" in str(content.get("architectures")):
        return "vila"
    if (folder / "llm").is_dir() or "llm_cfg" in content:
        return "native"
    raise DataError(
        "no layout of an NVILA checkpoint", where=str(folder), value=kind, do=f"Known are {', '.join(LAYOUTS)}"
    )


def part_folders(folder: Path) -> dict[str, Path]:
    """Folder of each part of a native checkpoint.

    `llm_cfg` and its like are dictionaries, or name a folder. A name that was right where the model was trained is
    looked up by its last component here; nothing outside of the checkpoint is read.

    Raises:
        DataError: a name leads to no folder of the checkpoint.
    """
    content = read_json(folder / "config.json")
    return {part: _part_folder(folder, part, content.get(f"{part}_cfg")) for part in PARTS}


def _part_folder(folder: Path, part: str, named: Any) -> Path:
    if not isinstance(named, str):
        return folder / part
    for candidate in (folder / named, folder / Path(named).name):
        if candidate.is_dir() and candidate.resolve().is_relative_to(folder.resolve()):
            return candidate
    raise DataError(
        f"{part}_cfg names a place outside of the checkpoint",
        where=str(folder / "config.json"),
        value=named,
        do=f"Put the weights into {folder / part} and remove the name",
    )


def read_native_config(folder: Path | str) -> ModelConfig:
    """The configuration of a native checkpoint; each part's own config.json counts, not the copy at the top."""
    folder = Path(folder)
    content = read_json(folder / "config.json")
    folders = part_folders(folder)
    top = content.get("llm_cfg")
    limits = {k: v for k, v in top.items() if "max_length" in k} if isinstance(top, dict) else {}
    if not limits:
        settings = read_optional(folders["llm"] / "tokenizer_config.json")
        limits = {"tokenizer_model_max_length": settings.get("model_max_length")}
    content["llm_cfg"] = {**read_json(folders["llm"] / "config.json"), **limits}
    content["vision_tower_cfg"] = read_json(folders["vision_tower"] / "config.json")
    content["mm_projector_cfg"] = read_json(folders["mm_projector"] / "config.json")
    return with_generation(checked_config(content, folder / "config.json", folders["vision_tower"]), folders["llm"])


def checked_config(content: Mapping[str, Any], path: Path, pictures: Path) -> ModelConfig:
    """The configuration read from `path`, checked against the `preprocessor_config.json` of the folder `pictures`."""
    processor = pictures / PROCESSOR
    settings = read_optional(processor)
    with reading(processor):
        refuse(settings, refusals.PROCESSOR, str(processor))
    with reading(path):
        config = ModelConfig.from_json(content, where=str(path))
    check_size(settings.get("size"), (config.tile_pixels, config.s2_scales[-1]), str(processor))
    return config


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object of a checkpoint.

    Raises:
        DataError: missing or no JSON object.
    """
    try:
        return read_object(path)
    except (FileNotFoundError, NotADirectoryError):
        raise DataError(
            "not there", where=str(path), do="A checkpoint has llm/, vision_tower/ and mm_projector/, or is flat"
        ) from None


def read_optional(path: Path) -> dict[str, Any]:
    """A JSON object of a checkpoint; empty where nothing of this name lies there."""
    return read_json(path) if os.path.lexists(path) else {}


def with_generation(config: ModelConfig, folder: Path) -> ModelConfig:
    """The settings of generation beside the decoder are carried; our own `generate` is asked for each."""
    return replace(config, generation=read_optional(folder / "generation_config.json"))


def _check_vocabulary(config: ModelConfig, tokenizer: Path) -> None:
    """The time tokens that the configuration speaks of are there; the tokenizer is not read where it names none."""
    if config.time_tokens:
        from nvila.components.model.text.timetokens import check_time_tokens, time_token_ids
        from nvila.components.model.text.tokenizer import load_tokenizer

        check_time_tokens(time_token_ids(load_tokenizer(tokenizer)), config.time_tokens)
