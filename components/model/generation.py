"""Decoding with a key-value cache: greedy or sampled, a whole batch at once, stopping when every row has ended."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from nvila.components.model.splice import Spliced


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen and when a row ends."""

    max_new_tokens: int
    stop: frozenset[int]
    temperature: float = 0.0
    seed: int = 0


@torch.no_grad()
def decode_tokens(llm: Any, prompt: Spliced, sampling: Sampling) -> list[list[int]]:
    """New tokens of each row, without the stop token.

    Args:
        llm: a `Qwen2ForCausalLM`.
        prompt: left-padded, so that the last column is each row's last token.
        sampling: limits and temperature.
    """
    from transformers import DynamicCache

    device, rows = prompt.embeds_BTH.device, len(prompt.embeds_BTH)
    draws = [torch.Generator().manual_seed(sampling.seed + row) for row in range(rows)]
    stop = torch.tensor(sorted(sampling.stop), device=device)
    cache = DynamicCache(config=llm.config)
    mask, position = prompt.attention_mask_BT, prompt.position_ids_BT
    step: dict[str, torch.Tensor] = {"inputs_embeds": prompt.embeds_BTH}
    produced: list[torch.Tensor] = []
    ended = torch.zeros(rows, dtype=torch.bool, device=device)
    for _ in range(sampling.max_new_tokens):
        hidden = llm.model(
            **step, attention_mask=mask, position_ids=position, past_key_values=cache, use_cache=True
        ).last_hidden_state
        token = _choose(llm.lm_head(hidden[:, -1]).float(), sampling.temperature, draws)
        produced.append(token)
        ended |= torch.isin(token, stop)
        if bool(ended.all()):
            break
        step = {"input_ids": token[:, None]}
        position = position[:, -1:] + 1
        mask = torch.cat([mask, mask.new_ones(rows, 1)], dim=1)
    if not produced:
        return [[] for _ in range(rows)]
    return [_until_stop(row, sampling.stop) for row in torch.stack(produced, dim=1).tolist()]


def _choose(logits: torch.Tensor, temperature: float, draws: list[torch.Generator]) -> torch.Tensor:
    """(B,) next tokens from (B, V) logits; ties of the greedy choice go to the lowest id."""
    if temperature <= 0:
        return logits.argmax(dim=-1)
    probabilities = torch.softmax(logits / temperature, dim=-1).cpu()
    drawn = [torch.multinomial(p, 1, generator=g) for p, g in zip(probabilities, draws, strict=True)]
    return torch.cat(drawn).to(logits.device)


def _until_stop(tokens: list[int], stop: frozenset[int]) -> list[int]:
    end = next((i for i, token in enumerate(tokens) if token in stop), len(tokens))
    return tokens[:end]
