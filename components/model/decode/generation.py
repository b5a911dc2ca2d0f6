"""Decoding with a key-value cache: greedy or sampled, a whole batch at once, stopping when every row has ended."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from nvila.components.contracts.errors import ConfigError
from nvila.components.model.splice import Spliced
from nvila.components.model.text.controls import control_strings, mend, settled
from nvila.components.model.text.timetokens import Times

if TYPE_CHECKING:
    from nvila.components.model.decode.structured import JsonSchema


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen and when a row ends."""

    max_new_tokens: int
    stop: frozenset[int]
    temperature: float = 0.0
    """0 takes the likeliest token."""
    seed: int = 0
    top_p: float = 1.0
    """Draw from the likeliest tokens that together have this probability."""
    schema: JsonSchema | None = None
    """What the answers have to be; one that `max_new_tokens` cuts is only the beginning of it."""
    positions: int | None = None
    """Most of a prompt with its answer: a row ends there, as in vLLM. None is no end."""

    def __post_init__(self) -> None:
        if not 0 < self.top_p <= 1:
            raise ConfigError("must be above 0 and at most 1", where="top_p", value=self.top_p)
        if self.temperature < 0:
            raise ConfigError("must not be negative", where="temperature", value=self.temperature)


def decode_tokens(llm: Any, prompt: Spliced, sampling: Sampling) -> list[list[int]]:
    """New tokens of each row, without the stop token.

    Args:
        llm: a `Qwen2ForCausalLM`.
        prompt: left-padded, so that the last column is each row's last token.
        sampling: limits and temperature.
    """
    produced = list(decode_steps(llm, prompt, sampling))
    if not produced:
        return [[] for _ in range(len(prompt.embeds_BTH))]
    rooms, rows = _room(prompt, sampling).tolist(), torch.stack(produced, dim=1).tolist()
    return [_until_stop(row[:room], sampling.stop) for row, room in zip(rows, rooms, strict=True)]


@torch.no_grad()
def decode_steps(llm: Any, prompt: Spliced, sampling: Sampling) -> Iterator[torch.Tensor]:
    """(B,) next tokens, step by step, until every row has had a stop token; arguments as of `decode_tokens`."""
    from transformers import DynamicCache

    device, rows = prompt.embeds_BTH.device, len(prompt.embeds_BTH)
    draws = [torch.Generator().manual_seed(sampling.seed + row) for row in range(rows)]
    stop = torch.tensor(sorted(sampling.stop), device=device)
    cache = DynamicCache(config=llm.config)
    mask, position = prompt.attention_mask_BT, prompt.position_ids_BT
    step: dict[str, torch.Tensor] = {"inputs_embeds": prompt.embeds_BTH}
    ended = torch.zeros(rows, dtype=torch.bool, device=device)
    room = _room(prompt, sampling)
    allowed = None if sampling.schema is None else sampling.schema.begin(rows)
    for made in range(1, sampling.max_new_tokens + 1):
        hidden = llm.model(
            **step, attention_mask=mask, position_ids=position, past_key_values=cache, use_cache=True
        ).last_hidden_state
        logits = llm.lm_head(hidden[:, -1]).float()
        token = _choose(logits if allowed is None else allowed.mask(logits), sampling, draws)
        yield token
        if allowed is not None:
            allowed.accept(token)
        ended |= torch.isin(token, stop) | (room <= made)
        if bool(ended.all()):
            return
        step = {"input_ids": token[:, None]}
        position = position[:, -1:] + 1
        mask = torch.cat([mask, mask.new_ones(rows, 1)], dim=1)


def _room(prompt: Spliced, sampling: Sampling) -> torch.Tensor:
    """(B,) most tokens of each answer."""
    taken = prompt.attention_mask_BT.sum(dim=1)
    most = torch.full_like(taken, sampling.max_new_tokens)
    return most if sampling.positions is None else torch.minimum(most, sampling.positions - taken)


def answer_text(tokenizer: Any, tokens: list[int]) -> str:
    """The stripped text of an answer, without special tokens; control strings that it speaks of are whole again."""
    return mend(tokenizer.decode(tokens, skip_special_tokens=True).strip(), control_strings(tokenizer))


def text_pieces(tokenizer: Any, tokens: Iterable[int], times: Times | None = None) -> Iterator[str]:
    """An answer's text as its tokens come; the pieces together are the `answer_text` of all tokens, as `times` says it.

    Held back until more comes: white space, which may be the last, characters of which only a part is there, and what
    may become a broken-up control string or a time token.
    """
    controls = control_strings(tokenizer)
    ids: list[int] = []
    sent = ""
    for token in tokens:
        ids.append(token)
        text = tokenizer.decode(ids, skip_special_tokens=True).lstrip().rstrip("\ufffd").rstrip()
        text = mend(settled(text, controls), controls)
        text = times.said(text, whole=False) if times else text
        if len(text) > len(sent):
            yield text[len(sent) :]
            sent = text
    text = answer_text(tokenizer, ids)
    if rest := (times.said(text) if times else text)[len(sent) :]:
        yield rest


def until_stop(tokens: Iterable[torch.Tensor], stop: frozenset[int]) -> Iterator[int]:
    """Tokens of the one row of `decode_steps`, without the stop token."""
    for token in tokens:
        if int(token[0]) in stop:
            return
        yield int(token[0])


def _choose(logits: torch.Tensor, sampling: Sampling, draws: list[torch.Generator]) -> torch.Tensor:
    """(B,) next tokens from (B, V) logits; ties of the greedy choice go to the lowest id."""
    if sampling.temperature == 0:
        return logits.argmax(dim=-1)
    probabilities = nucleus(torch.softmax(logits / sampling.temperature, dim=-1), sampling.top_p).cpu()
    drawn = [torch.multinomial(p, 1, generator=g) for p, g in zip(probabilities, draws, strict=True)]
    return torch.cat(drawn).to(logits.device)


def nucleus(probabilities: torch.Tensor, top_p: float) -> torch.Tensor:
    """(B, V) with the unlikeliest set to zero: the fewest likeliest that reach `top_p` stay, at least one."""
    if top_p >= 1:
        return probabilities
    ordered, index = probabilities.sort(dim=-1, descending=True, stable=True)
    before = torch.nn.functional.pad(ordered.cumsum(-1)[..., :-1], (1, 0))
    return torch.zeros_like(probabilities).scatter(-1, index, ordered.masked_fill(before >= top_p, 0.0))


def _until_stop(tokens: list[int], stop: frozenset[int]) -> list[int]:
    end = next((i for i, token in enumerate(tokens) if token in stop), len(tokens))
    return tokens[:end]
