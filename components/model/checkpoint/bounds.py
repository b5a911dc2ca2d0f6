"""The numbers of a configuration held against the headers of its weights, before anything is built of that size."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping

import torch

from nvila.components.contracts.errors import DataError
from nvila.components.model.checkpoint.tensorfile import FLOATING, Stored
from nvila.components.model.config.config import ModelConfig
from nvila.components.model.vision.projector import build_projector
from nvila.components.model.vision.tower import used_blocks

_BLOCK = re.compile(r"(llm|vision_tower)\.(?:\w+\.)*layers\.(\d+)\..*")
_EMBEDDINGS = "vision_tower.vision_model.embeddings"


def check_bounds(config: ModelConfig, tensors: Mapping[str, Stored], *, cut: bool) -> None:
    """Whether the sizes that a configuration names are those of the weights that lie beside it.

    Tensors that are missing, superfluous or quantized are left to `weights.check` and `quantized`.

    Args:
        config: whose numbers are doubted.
        tensors: `canonical`.
        cut: the tower's unused blocks are left out, as in a serving folder.

    Raises:
        DataError: names the key, what it says and what the weights say.
    """
    for key, says, have in _numbers(config, tensors, cut):
        if says != have:
            raise DataError(
                f"the weights say {have}",
                where=key,
                value=says,
                do="Correct it, or use the weights that it was made for",
            )
    with torch.device("meta"):
        projector = build_projector(config.projector, config.mm_hidden_size, config.llm_hidden_size)
    for name, needed in projector.state_dict().items():
        stored = tensors.get(f"mm_projector.{name}")
        if stored is not None and stored.code in FLOATING and stored.shape != tuple(needed.shape):
            raise DataError(
                f"mm_projector.{name} has another shape than the projector of this configuration",
                where="mm_projector_type, s2_scales, hidden_size",
                value=f"{stored.shape} instead of {tuple(needed.shape)}",
            )


def _numbers(config: ModelConfig, tensors: Mapping[str, Stored], cut: bool) -> Iterator[tuple[str, int, int]]:
    """Key, what it says, and what the weights say; keys of which they say nothing are left out."""
    blocks: dict[str, set[int]] = {"llm": set(), "vision_tower": set()}
    for name in tensors:
        if found := _BLOCK.fullmatch(name):
            blocks[found[1]].add(int(found[2]))
    vision, llm = config.vision, config.llm
    layers = vision["num_hidden_layers"]
    kept = used_blocks(layers, config.select_layer) if cut else layers
    if kept > len(blocks["vision_tower"]):
        yield "vision_tower_cfg: num_hidden_layers", layers, len(blocks["vision_tower"]) + layers - kept
    if int(llm.get("num_hidden_layers", 0)) > len(blocks["llm"]):
        yield "llm_cfg: num_hidden_layers", llm["num_hidden_layers"], len(blocks["llm"])
    rows: list[tuple[str, int, str, Callable[[tuple[int, ...]], int]]] = [
        ("vision_tower_cfg: hidden_size", vision["hidden_size"], f"{_EMBEDDINGS}.position_embedding.weight", _last),
        ("vision_tower_cfg: patch_size", vision["patch_size"], f"{_EMBEDDINGS}.patch_embedding.weight", _last),
        (
            "vision_tower_cfg: image_size and patch_size make patches",
            config.features_per_side**2,
            f"{_EMBEDDINGS}.position_embedding.weight",
            _first,
        ),
        ("llm_cfg: hidden_size", llm["hidden_size"], "llm.model.embed_tokens.weight", _last),
        ("llm_cfg: hidden_size", llm["hidden_size"], "llm.model.norm.weight", _last),
    ]
    for key, says, name, side in rows:
        if name in tensors and tensors[name].shape:
            yield key, says, side(tensors[name].shape)


def _first(shape: tuple[int, ...]) -> int:
    return shape[0]


def _last(shape: tuple[int, ...]) -> int:
    return shape[-1]
