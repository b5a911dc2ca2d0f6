"""The GPUs whose speed is known, as their makers state it: what a plan counts with, and what an MFU is a share of."""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Gpu:
    """An accelerator as its maker states it."""

    name: str
    memory_bytes: int
    bf16: float
    """Operations a second, dense."""
    fp32: float
    fp8: float | None
    """None where it has no products in FP8."""
    bytes_a_second: float
    """That its memory moves."""


GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("a100", 80 * 10**9, 312e12, 19.5e12, None, 2.04e12),
        Gpu("l4", 24 * 10**9, 121e12, 30.3e12, 242e12, 0.3e12),
        Gpu("4090", 24 * 10**9, 165e12, 82.6e12, 330e12, 1.01e12),
        Gpu("l40s", 48 * 10**9, 362e12, 91.6e12, 733e12, 0.864e12),
        Gpu("h100", 80 * 10**9, 989e12, 67e12, 1979e12, 3.35e12),
        Gpu("h200", 141 * 10**9, 989e12, 67e12, 1979e12, 4.8e12),
        Gpu("b200", 180 * 10**9, 2250e12, 75e12, 4500e12, 8e12),
    )
}

_SLOWER = re.compile(r"\b(H100|H200)\b.*\b(PCIe|NVL)\b|\bNVL\b.*\b(H100|H200)\b|\b4090 (D|Laptop)\b")
"""Boards of the same name that are clocked lower."""


def gpu_of(product: str) -> Gpu | None:
    """The GPU that a driver calls `NVIDIA H100 80GB HBM3`; None where its speed is not known."""
    words = set(re.split(r"[^a-z0-9]+", product.lower()))
    return None if _SLOWER.search(product) else next((gpu for name, gpu in GPUS.items() if name in words), None)
