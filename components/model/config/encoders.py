"""`image_encoder` and `video_encoder` of the reference's `config.json`: a class to build and its arguments."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from typing import Any

from nvila.components.contracts.errors import ConfigError

PoolSizes = tuple[tuple[int, int, int], ...]
Texts = tuple[str, str, str]
NAMESPACE = "llava.model.encoders"
MOST_POOLED, MOST_CHARACTERS = 4096, 1024
"""Of a pool's side, and of a text that stands in front of or behind each frame."""
_TEXTS = {"start_tokens", "end_tokens"}
_IMAGE = {"BasicImageEncoder": _TEXTS}
_VIDEO = {"BasicVideoEncoder": _TEXTS, "TSPVideoEncoder": _TEXTS | {"pool_sizes", "sep_tokens"}}


def check_image_encoder(value: Any, where: str) -> None:
    """Pictures end with a line break and have nothing else around them.

    Raises:
        ConfigError: another encoder, or other tokens.
    """
    content = _read(value, _IMAGE, f"{where}: image_encoder")
    if content.get("start_tokens") or content.get("end_tokens", "\n") != "\n":
        raise ConfigError(
            "only a line break behind each picture is supported", where=f"{where}: image_encoder", value=content
        )


def read_video_encoder(value: Any, where: str) -> tuple[PoolSizes, Texts]:
    """Pool sizes, and the texts before each frame, behind it and behind each scale.

    Raises:
        ConfigError: another encoder, or pools that are not three whole numbers above 0.
    """
    where = f"{where}: video_encoder"
    content = _read(value, _VIDEO, where)
    texts = (content.get("start_tokens"), content.get("end_tokens", "\n"), content.get("sep_tokens"))
    if not all(text is None or (isinstance(text, str) and len(text) <= MOST_CHARACTERS) for text in texts):
        raise ConfigError("start_tokens, end_tokens and sep_tokens are short texts", where=where, value=content)
    start, end, sep = (text or "" for text in texts)
    try:
        pools = tuple((int(t), int(h), int(w)) for t, h, w in content.get("pool_sizes") or [(1, 1, 1)])
    except (TypeError, ValueError, OverflowError):
        pools = ()
    if not pools or any(not 1 <= size <= MOST_POOLED for pool in pools for size in pool):
        raise ConfigError("pool_sizes are triples of whole numbers above 0", where=where, value=content)
    return pools, (start, end, sep)


def _read(value: Any, known: Mapping[str, Collection[str]], where: str) -> dict[str, Any]:
    """An encoder's settings: a dictionary, the same as a JSON string, or absent."""
    try:
        content = json.loads(value) if isinstance(value, str) else (value or {})
    except (ValueError, RecursionError):
        content = None
    if not isinstance(content, dict):
        raise ConfigError("not an encoder's settings", where=where, value=value)
    target = content.get("_target_")
    name = str(target).rpartition(".")[2]
    if target is not None and (name not in known or not f"{target}.".startswith(("llava.", f"{name}."))):
        raise ConfigError(
            "an encoder that is not computed here",
            where=f"{where}: _target_",
            value=target,
            do=f"Use one of {', '.join(f'{NAMESPACE}.{name}' for name in known)}",
        )
    takes = known[name] if target is not None else {key for keys in known.values() for key in keys}
    if strange := sorted(content.keys() - set(takes) - {"_target_"}):
        raise ConfigError("settings that this encoder does not have", where=where, value=strange)
    return content
