"""The Linears inside a decoder's blocks, by their sizes, and which of them FP8 takes: one rule for recipe, plan and
worker. Everything else (output layer, embeddings, projector, tower) stays as it is: paper, section 3.2."""

from __future__ import annotations

from collections.abc import Iterable

FP8_DIVISOR = 16
"""Of both sizes of a matrix in FP8, and of the positions of a pass."""


def decoder_linears(
    hidden: int, heads: int, kv_heads: int, mlp: int, head_size: int | None = None
) -> dict[str, tuple[int, int]]:
    """Output and input features of each Linear of a block of Qwen2, by its name inside the block."""
    each = head_size or hidden // heads
    return {
        "self_attn.q_proj": (heads * each, hidden),
        "self_attn.k_proj": (kv_heads * each, hidden),
        "self_attn.v_proj": (kv_heads * each, hidden),
        "self_attn.o_proj": (hidden, heads * each),
        "mlp.gate_proj": (mlp, hidden),
        "mlp.up_proj": (mlp, hidden),
        "mlp.down_proj": (hidden, mlp),
    }


def why_not_fp8(features: tuple[int, int], min_features: int) -> str | None:
    """Why a Linear of a block stays as it is, in words; None where FP8 takes it."""
    if min(features) < min_features:
        return f"{min(features)} features, below min_features {min_features}"
    if any(size % FP8_DIVISOR for size in features):
        return f"{' x '.join(map(str, features))} features are not both divisible by {FP8_DIVISOR}"
    return None


def fp8_linears(linears: dict[str, tuple[int, int]], min_features: int) -> dict[str, tuple[int, int]]:
    """Those that FP8 takes."""
    return {name: features for name, features in linears.items() if why_not_fp8(features, min_features) is None}


def no_fp8(linears: Iterable[tuple[int, int]], min_features: int) -> str:
    """What is said where FP8 takes none of the decoder's Linears: as bf16 under its name nothing may run."""
    most = max((min(features) for features in linears if why_not_fp8(features, 1) is None), default=0)
    lower = f"say {most} or less, or" if most else f"and none here is divisible by {FP8_DIVISOR}: say"
    return (
        f"no Linear of the decoder would be multiplied in FP8: both sizes must be at least {min_features} and "
        f"divisible by {FP8_DIVISOR}; {lower} train.precision bf16"
    )
