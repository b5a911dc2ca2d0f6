"""The decoder's rotary positions: one reading of the three places where configurations keep them.

Older files have `rope_theta` and `rope_scaling`, those of transformers 5 `rope_parameters`; a file with both makes
transformers 5 forget `rope_theta`. What is written here is the older pair, which every reader understands.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from nvila.components.contracts.errors import ConfigError

THETA, POSITIONS = 10000.0, 32768
"""`rope_theta` and `max_position_embeddings` of a `Qwen2Config` that names none."""
_PLACES = ("rope_scaling", "rope_parameters")
_NAMES = {"type", "rope_type", "rope_theta", "partial_rotary_factor"}
_KEYS = {
    "default": _NAMES,
    "linear": _NAMES | {"factor"},
    "dynamic": _NAMES | {"factor"},
    "yarn": _NAMES | {"factor", "beta_fast", "beta_slow", "original_max_position_embeddings"},
}
"""Per kind of scaling, the keys that the reference and transformers 5 read alike."""


def with_rope(llm: Mapping[str, Any], length: int) -> dict[str, Any]:
    """A decoder's configuration with its positions settled: `rope_theta`, and `rope_scaling` where they are stretched.

    Where sequences may be longer than `max_position_embeddings`, positions are stretched by the next whole number, as
    in the reference's `context_length_extension`.

    Args:
        llm: Hugging Face's `Qwen2Config` keys.
        length: most tokens of a sequence.

    Raises:
        ConfigError: a scaling that is not computed as in the reference, or places that contradict each other.
    """
    kept = {key: value for key, value in llm.items() if key not in _PLACES}
    kept["rope_theta"] = _theta(llm)
    scaling = _scaling(llm)
    kind = scaling.get("type", "default")
    positions = int(llm.get("max_position_embeddings") or POSITIONS)
    if length > positions:
        if kind not in ("default", "linear"):
            raise _refusal(
                f"{kind} scaling and sequences of {length} tokens over {positions} positions: "
                "the reference trains these with linear scaling",
                llm,
            )
        return {**kept, "rope_scaling": {"type": "linear", "factor": float(math.ceil(length / positions))}}
    if kind == "yarn" and scaling.get("original_max_position_embeddings", positions) != positions:
        raise _refusal(f"the reference reckons YaRN from max_position_embeddings, {positions}", llm)
    return {**kept, "rope_scaling": scaling} if scaling else kept


def most_positions(llm: Mapping[str, Any], length: int) -> int:
    """Positions that a decoder settled by `with_rope` has: as many as in vLLM, where linear scaling alone makes more.

    Arguments as of `with_rope`.
    """
    scaling = with_rope(llm, length).get("rope_scaling", {})
    factor = scaling["factor"] if scaling.get("type") == "linear" else 1.0
    return int(int(llm.get("max_position_embeddings") or POSITIONS) * factor)


def check_served(llm: Mapping[str, Any]) -> None:
    """Whether vLLM gives the decoder the same positions.

    Raises:
        ConfigError: dynamic scaling, whose positions end at `max_position_embeddings` in vLLM while prompts may be
            longer by its factor.
    """
    if _scaling(llm).get("type") == "dynamic":
        raise _refusal("vLLM takes longer prompts with dynamic scaling than it has positions for", llm)


def _theta(llm: Mapping[str, Any]) -> float:
    named = [llm.get("rope_theta"), *(_section(llm, place).get("rope_theta") for place in _PLACES)]
    found = {_number(theta, llm) for theta in named if theta is not None}
    if len(found) > 1:
        raise _refusal("rope_theta differs from place to place", llm)
    return found.pop() if found else THETA


def _scaling(llm: Mapping[str, Any]) -> dict[str, Any]:
    """`type`, `factor` and what else is set; empty where nothing is scaled."""
    found = [scaling for place in _PLACES if (scaling := _checked(_section(llm, place), llm))]
    if len(found) > 1 and found[0] != found[1]:
        raise _refusal("rope_scaling and rope_parameters differ", llm)
    return found[0] if found else {}


def _checked(section: Mapping[str, Any], llm: Mapping[str, Any]) -> dict[str, Any]:
    kinds = {str(section[key]) for key in ("type", "rope_type") if section.get(key) is not None} or {"default"}
    if len(kinds) > 1 or not kinds <= _KEYS.keys():
        raise _refusal(f"this kind of scaling is not computed; known are {', '.join(_KEYS)}", llm)
    (kind,) = kinds
    kept = {key: value for key, value in section.items() if value is not None}
    if kept.get("partial_rotary_factor", 1.0) != 1.0 or not kept.keys() <= _KEYS[kind]:
        raise _refusal(
            f"{kind} scaling has no {', '.join(sorted(kept.keys() - _KEYS[kind])) or 'partial rotation'}", llm
        )
    if kind == "default":
        return {}
    if _number(kept.get("factor"), llm) < 1.0:
        raise _refusal("the factor is below 1", llm)
    return {"type": kind, **{key: value for key, value in kept.items() if key not in _NAMES}}


def _section(llm: Mapping[str, Any], place: str) -> Mapping[str, Any]:
    section = llm.get(place) or {}
    if not isinstance(section, Mapping):
        raise _refusal(f"{place} is no JSON object", llm)
    return section


def _number(value: Any, llm: Mapping[str, Any]) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise _refusal("not a number above 0", llm)
    return float(value)


def _refusal(what: str, llm: Mapping[str, Any]) -> ConfigError:
    said = {key: llm[key] for key in ("rope_theta", *_PLACES) if llm.get(key) is not None}
    return ConfigError(
        what,
        where="llm/config.json: rope_scaling",
        value=said,
        do="Set rope_scaling to null, or to linear with the factor that the weights were trained with",
    )
