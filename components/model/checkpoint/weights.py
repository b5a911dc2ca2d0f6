"""The one rule by which tensors become a model's weights, for loading, converting and saving alike.

Each parameter and each saved buffer gets a tensor of finite floats in its shape, from one place, and no tensor is left
over; so nothing ever stays as it was initialised. Names here are those of the flat layouts.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import TypeVar

import torch

from nvila.components.contracts.errors import DataError
from nvila.components.contracts.text import say
from nvila.components.model.checkpoint.tensorfile import DTYPES, FLOATING, Later, Stored, is_finite, put, values
from nvila.components.model.config.config import ModelConfig
from nvila.components.model.nvila import NVILA

TOWER = "vision_tower.vision_model."
EMBEDDINGS, HEAD = "llm.model.embed_tokens.weight", "llm.lm_head.weight"
Source = Stored | torch.Tensor
"""Where a tensor comes from: a file, or memory."""
Receive = Callable[[str, torch.Tensor, Callable[[], None]], None]
"""Takes a tensor of a model, by its name, and what reads its values into it; when it returns, they may be held in
another way, or be another process's."""
_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
S = TypeVar("S", bound=Source | Later)

_NEVER_COMPUTED = re.compile(
    r"llm\.(model\.)?(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq"  # older transformers saved what they computed
    r"|vision_tower\.(vision_model\.)?embeddings\.position_ids"
    r"|vision_tower\.(vision_model\.)?head\..*"  # SigLIP's pooling
    r"|vision_tower\.(text_model\..*|logit_scale|logit_bias)"  # a whole SigLIP has a tower for text
    r"|.*\._extra_state"  # scales of training in FP8
)


def canonical(found: Mapping[str, S], projector: str, where: str) -> dict[str, S]:
    """Tensors by `llm.*`, `vision_tower.vision_model.*` and `mm_projector.*`; what no NVILA computes is left out.

    Args:
        found: by part and name, as files of any layout call them: the tower's `vision_model.` may be missing.
        projector: its kind; checkpoints of our first versions have the linear one as `layers.0`.
        where: for the error.

    Raises:
        DataError: a tensor is there under two names.
    """
    named: dict[str, S] = {}
    for name, tensor in found.items():
        if _NEVER_COMPUTED.fullmatch(name):
            continue
        if name.startswith("vision_tower.") and not name.startswith(TOWER):
            name = TOWER + name.removeprefix("vision_tower.")
        if projector == "linear":
            name = name.replace("mm_projector.layers.0.", "mm_projector.layers.", 1)
        if name in named:
            raise DataError("a tensor is there under two names", where=where, value=name, do="Remove one of them")
        named[name] = tensor
    return named


def tied(config: ModelConfig) -> bool:
    """Whether the output layer is the embeddings, and so has no tensor of its own."""
    return bool(config.llm.get("tie_word_embeddings"))


def untied(config: ModelConfig) -> ModelConfig:
    """`config` with an output layer of its own."""
    return replace(config, llm={**config.llm, "tie_word_embeddings": False})


def settle_head(config: ModelConfig, found: Mapping[str, S], rows: int, where: str) -> tuple[ModelConfig, dict[str, S]]:
    """What is true of a tied output layer: the tensors decide, whatever the configuration says.

    Args:
        config: says whether the output layer is tied.
        found: `canonical` tensors.
        rows: of the vocabulary; what lies behind them is dropped and does not count.
        where: named in the notice.

    Returns:
        A tied configuration, and the tensors without a head that only repeats the embeddings. Or an untied one, with a
        line on stderr, where the head is another: it was trained, and is kept.
    """
    kept = dict(found)
    if tied(config) and HEAD in found:
        if EMBEDDINGS not in found or _same_rows(found[HEAD], found[EMBEDDINGS], rows):
            del kept[HEAD]
        else:
            says = "the output layer is not the embeddings, though tie_word_embeddings says so: kept, and untied"
            say(f"{where}: {says}")
            config = untied(config)
    return config, kept


def wanted(model: NVILA) -> dict[str, torch.Tensor]:
    """Each parameter and saved buffer of a model by its `canonical` name, a tied output layer left out."""
    named = canonical(model.state_dict(keep_vars=True), "", "")  # a copy's storage would outlive the parameter's
    return {name: tensor for name, tensor in named.items() if name != HEAD or not tied(model.config)}


def check(found: Mapping[str, Source | Later], model: NVILA, where: str, *, says: str | None = None) -> None:
    """Whether tensors are exactly those of a model, in shape and kind; no value is looked at.

    Args:
        found: `canonical`, settled by `settle_head`.
        model: may be on the meta device.
        where: for the error.
        says: what the error says in place of "missing" or "does not have".

    Raises:
        DataError: a tensor is missing, superfluous, of another shape, or not of floats.
    """
    needed = wanted(model)
    missing, extra = sorted(needed.keys() - found.keys()), sorted(found.keys() - needed.keys())
    if missing or extra:
        what = says or ("tensors are missing" if missing else "tensors that the model does not have")
        raise DataError(what, where=where, value=(missing or extra)[:5], do="Check the checkpoint's config.json")
    for name, tensor in needed.items():
        source, shape = found[name], tuple(tensor.shape)
        has, place = tuple(source.shape), str(source.path) if isinstance(source, Stored) else where
        # Decoders are often padded beyond the tokenizer's vocabulary; the reference drops those rows on loading.
        if has[1:] != shape[1:] or (has[:1] < shape[:1] if name in (EMBEDDINGS, HEAD) else has != shape):
            raise DataError(
                f"{name} has another shape than the configuration says", where=place, value=f"{has} instead of {shape}"
            )
        kind = source.code if isinstance(source, Stored) else str(source.dtype)
        if not (kind in FLOATING if isinstance(source, Stored) else source.dtype in _FLOATS):
            raise DataError(
                f"{name} does not hold floating-point weights",
                where=place,
                value=kind,
                do="Use the checkpoint from before it was quantized",
            )


@torch.no_grad()
def fill(
    model: NVILA, found: Mapping[str, Source], where: str, receive: Receive = lambda _name, _tensor, read: read()
) -> None:
    """Give a model its weights one by one, in the dtype it has; `check` comes first.

    Raises:
        DataError: a value is not finite, or too large for the model's dtype.
    """
    for name, tensor in wanted(model).items():
        receive(name, tensor, partial(_read, tensor, found[name], name, where))


def _read(tensor: torch.Tensor, source: Source, name: str, where: str) -> None:
    if isinstance(source, Stored):
        put(tensor.view(-1), values(source, name, tensor.numel(), tensor.dtype))
    else:
        tensor.copy_(source[: len(tensor)] if tensor.dim() else source)
        require_finite(tensor, name, where)


def require_finite(tensor: torch.Tensor, name: str, where: str) -> None:
    """Raises:
    DataError: a tensor of floats has a value that is NaN or infinite.
    """
    if tensor.dtype in _FLOATS and not is_finite(tensor):
        raise DataError(f"{name} has values that are NaN or infinite", where=where)


def _same_rows(head: Source | Later, embeddings: Source | Later, rows: int) -> bool:
    """Whether the first rows hold the same values; in small memory."""
    if head.shape[1:] != embeddings.shape[1:] or min(head.shape[0], embeddings.shape[0]) < rows:
        return False
    if isinstance(head, torch.Tensor) and isinstance(embeddings, torch.Tensor):
        same = head.data_ptr() == embeddings.data_ptr() and head.dtype == embeddings.dtype
        return same or bool((head[:rows] == embeddings[:rows]).all())
    assert isinstance(head, Stored) and isinstance(embeddings, Stored)
    if not {head.code, embeddings.code} <= FLOATING:
        return False
    count = rows * (head.elements // max(head.shape[0], 1))
    wide = torch.promote_types(DTYPES[head.code], DTYPES[embeddings.code])
    both = (values(stored, name, count, wide) for stored, name in ((head, HEAD), (embeddings, EMBEDDINGS)))
    return all(torch.equal(one, other) for one, other in zip(*both, strict=True))
