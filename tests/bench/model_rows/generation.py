"""Decoding with a key-value cache, beside transformers' own loop over the same decoder."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from model_rows.measure import Measured, pair

from nvila.components.model.config.variants import QWEN_1_5B
from nvila.components.model.decode.generation import Sampling, decode_tokens
from nvila.components.model.splice import Spliced

PROMPT = 64
TINY = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 1000,
}


def rows() -> Iterator[Measured]:
    """A tiny decoder, and NVILA-Lite-2B's widths and vocabulary with 4 of its 28 layers."""
    yield _decode("tiny decoder", TINY, tokens=32, times=5)
    yield _decode("NVILA-Lite-2B's widths, 4 layers", {**QWEN_1_5B, "num_hidden_layers": 4}, tokens=8, times=2)


def _decode(name: str, sizes: dict[str, Any], tokens: int, times: int) -> Measured:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    llm: Any = Qwen2ForCausalLM(Qwen2Config(**sizes)).eval()
    llm.generation_config.eos_token_id = None
    ids = torch.arange(1, PROMPT + 1)[None]
    spliced = Spliced(llm.model.embed_tokens(ids), torch.ones_like(ids), torch.arange(PROMPT)[None], None)
    options = {"max_new_tokens": tokens, "do_sample": False, "pad_token_id": 0}

    def plain() -> list[int]:
        return llm.generate(ids, attention_mask=torch.ones_like(ids), **options)[0, PROMPT:].tolist()

    def ours() -> list[int]:
        return decode_tokens(llm, spliced, Sampling(tokens, frozenset()))[0]

    assert plain() == ours(), name
    work = f"prompt of {PROMPT} and {tokens} tokens with a cache, {name}"
    return work, "s", *pair(plain, ours, times), "transformers' generate; tokens equal", 1.0
