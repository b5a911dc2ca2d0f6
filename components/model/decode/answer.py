"""Answers of a model to prompts: of a batch at once, or of one in pieces.

Training reaches nothing of this room.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch

from nvila.components.contracts.errors import DataError
from nvila.components.model.batch import collate
from nvila.components.model.decode.generation import (
    Sampling,
    answer_text,
    decode_steps,
    decode_tokens,
    text_pieces,
    until_stop,
)
from nvila.components.model.nvila import NVILA
from nvila.components.model.splice import Spliced
from nvila.components.model.text.prompt import Prompt
from nvila.components.model.text.templates import stop_tokens

if TYPE_CHECKING:
    from nvila.components.model.decode.structured import JsonSchema


@torch.no_grad()
def generate(
    model: NVILA,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    max_new_tokens: int,
    *,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    schema: JsonSchema | None = None,
) -> list[str]:
    """Answers to a batch of prompts, the same as one by one.

    Args:
        model: in any mode, which it keeps.
        tokenizer: the model's.
        prompts: conversations ending with a human turn.
        max_new_tokens: most tokens per answer; one also ends where the decoder's positions do.
        temperature: 0 takes the likeliest token; above, samples with `seed`.
        top_p: sample from the likeliest tokens that together have this probability.
        seed: each prompt draws from its own generator, seeded by this and its place in the batch.
        schema: what the answers have to be as JSON; one that ends by itself is complete, one that is cut is not.

    Returns:
        The answers without special tokens, stripped; control strings in their text are whole again, and times of a clip
        are seconds.

    Raises:
        DataError: a prompt fills all positions of the decoder.
    """
    if not prompts:
        return []
    stop = stop_tokens(tokenizer)
    sampling = Sampling(max_new_tokens, stop, temperature, seed, top_p, schema, model.config.positions)
    was_training = model.training
    model.eval()
    tokens = decode_tokens(model.llm, _opening(model, tokenizer, prompts), sampling)
    model.train(was_training)
    texts = [answer_text(tokenizer, row) for row in tokens]
    return [prompt.times.said(text) if prompt.times else text for prompt, text in zip(prompts, texts, strict=True)]


def stream(
    model: NVILA,
    tokenizer: Any,
    prompt: Prompt,
    max_new_tokens: int,
    *,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    schema: JsonSchema | None = None,
) -> Iterator[str]:
    """The answer to one prompt in pieces as it is made; together they are what `generate` returns.

    The model must be in evaluation mode. Arguments as of `generate`.
    """
    assert not model.training, "streaming would leave the mode changed while the caller does something else"
    stop = stop_tokens(tokenizer)
    sampling = Sampling(max_new_tokens, stop, temperature, seed, top_p, schema, model.config.positions)
    with torch.no_grad():
        opening = _opening(model, tokenizer, [prompt])
    yield from text_pieces(tokenizer, until_stop(decode_steps(model.llm, opening, sampling), stop), prompt.times)


def _opening(model: NVILA, tokenizer: Any, prompts: Sequence[Prompt]) -> Spliced:
    """The decoder's input that asks for answers, left-padded."""
    items = [(prompt.encode(tokenizer, generate=True), prompt.visuals) for prompt in prompts]
    batch = collate(items, model.tokens.pad, side="left").to(model.device)
    spliced = model.prepare(batch.input_ids, batch.attention_mask, batch.visuals, side="left")
    length = spliced.embeds_BTH.shape[1]
    if length >= model.config.positions:
        raise DataError(
            f"the prompt is too long: the decoder has {model.config.positions} positions",
            value=length,
            do="Ask with less text, fewer media or fewer frames",
        )
    return spliced
