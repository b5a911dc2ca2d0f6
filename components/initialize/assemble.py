"""Puts published weights and a fresh projector into the native layout, file by file: no tensor of them is loaded."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from nvila.components.contracts.errors import ConfigError
from nvila.components.contracts.manifest import write_atomic
from nvila.components.contracts.progress import track
from nvila.components.contracts.recipe.model import ModelSettings
from nvila.components.contracts.results.model import Initialization
from nvila.components.data.fetch import fetch_version
from nvila.components.model.checkpoint.layouts import open_native, read_json
from nvila.components.model.checkpoint.native import checked
from nvila.components.model.checkpoint.shards import count
from nvila.components.model.config.config import ModelConfig, model_config
from nvila.components.model.text.jinja import REFERENCE_NAME
from nvila.components.model.vision.projector import build_projector


def assemble(settings: ModelSettings, seed: int, folder: Path) -> Initialization:
    """Write `folder` in the native layout and return what is worth showing of it: counts, and what was fetched.

    Args:
        settings: architecture; `base.vision_tower` and `base.llm` name the weights.
        seed: of the projector's initial weights, torch's default initialisation as in the reference.
        folder: gets `config.json`, `llm/`, `vision_tower/`, `mm_projector/`.

    Raises:
        ConfigError: the weights are not a SigLIP tower and a Qwen2 decoder, or do not fit the architecture.
        DataError: there are no such weights, or a file of them is broken, missing or superfluous.
        Unreachable: they cannot be fetched now.
    """
    base = settings.base
    fetched = {"vision_tower": fetch_version(str(base.vision_tower)), "llm": fetch_version(str(base.llm))}
    sources = {part: folder for part, (folder, _) in fetched.items()}
    vision = _config(sources["vision_tower"], "siglip_vision_model", "model.base.vision_tower")
    llm = _config(sources["llm"], "qwen2", "model.base.llm")
    config = model_config(settings, vision, llm)
    for part, source in sources.items():
        (folder / part).mkdir(parents=True, exist_ok=True)
        files = [file for file in sorted(source.iterdir()) if file.is_file() and file.suffix in _WANTED]
        for file in track(files, f"{part} files"):
            shutil.copyfile(file, folder / part / file.name)
    # The tower of a whole SigLIP is a section of its configuration; a native checkpoint has it on top.
    write_atomic(folder / "vision_tower" / "config.json", json.dumps(vision, indent=2))
    _write_projector(config, seed, folder / "mm_projector")
    # A decoder's own chat template, with its own system prompt, is not what NVILA is trained in.
    write_atomic(folder / "config.json", json.dumps({**config.to_json(), "chat_template": REFERENCE_NAME}, indent=2))
    checked(open_native(folder))
    return Initialization(
        parameters={part: count(folder / part) for part in ("vision_tower", "mm_projector", "llm")},
        weights={part: version for part, (_, version) in fetched.items()},
    )


_WANTED = {".safetensors", ".json", ".txt", ".jinja"}


def _config(folder: Path, model_type: str, option: str) -> dict[str, Any]:
    path = folder / "config.json"
    if not path.is_file():
        raise ConfigError("no config.json beside the weights", where=option, value=str(folder))
    content = read_json(path)
    content = content.get("vision_config", content) if model_type.startswith("siglip") else content
    if content.get("model_type") != model_type:
        raise ConfigError(f"not a {model_type} model", where=option, value=content.get("model_type"))
    return dict(content)


def _write_projector(config: ModelConfig, seed: int, folder: Path) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        projector = build_projector(config.projector, config.mm_hidden_size, config.llm_hidden_size)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(
        {name: tensor.contiguous() for name, tensor in projector.state_dict().items()}, folder / "model.safetensors"
    )
    write_atomic(folder / "config.json", json.dumps(config.to_json()["mm_projector_cfg"], indent=2))
