"""Which attention a model computes with, where and in which precision."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from nvila.components.model import device


class Part:
    """Has a weight somewhere, and remembers the attention it is told to use."""

    def __init__(self, where: str, dtype: Any) -> None:
        self.attention = "sdpa"
        self.weight = SimpleNamespace(device=SimpleNamespace(type=where), dtype=dtype)

    def get_input_embeddings(self) -> Part:
        return self

    def set_attn_implementation(self, name: str) -> None:
        self.attention = name


@pytest.mark.parametrize(
    ("installed", "where", "dtype", "expected"),
    [
        (True, "cuda", "bfloat16", "flash_attention_2"),
        (True, "cuda", "float32", "sdpa"),
        (True, "cpu", "bfloat16", "sdpa"),
        (False, "cuda", "bfloat16", "sdpa"),
    ],
)
def test_flash_attention_only_where_it_can_work(
    monkeypatch: pytest.MonkeyPatch, installed: bool, where: str, dtype: str, expected: str
) -> None:
    """It fails in the first forward pass on a CPU or in float32, and a model without it must load as before."""
    import torch
    import transformers.utils

    monkeypatch.setattr(transformers.utils, "is_flash_attn_2_available", lambda: installed)
    parts = [Part(where, getattr(torch, dtype)) for _ in range(2)]
    device.use_flash_attention(SimpleNamespace(vision_tower=parts[0], llm=parts[1]))  # type: ignore[arg-type]
    assert [part.attention for part in parts] == [expected, expected]
