"""Whether a question leaves the decoder room for an answer, and what is said where it does not."""

from __future__ import annotations

from typing import Any

from nvila.components.contracts.text import say
from nvila.components.model.config.config import ModelConfig
from nvila.components.model.positions import positions
from nvila.components.model.text.prompt import Prompt
from nvila.components.model.text.tokenizer import TokenIds


def leaves_room(
    prompt: Prompt, tokenizer: Any, config: ModelConfig, tokens: TokenIds, *, generate: bool = True
) -> bool:
    """Whether a question leaves the decoder a position for an answer; one that does not stays without any.

    Cut short it would be another question, and an error would end the evaluation of all the others. Without `generate`
    the conversation is taken as it stands.
    """
    ids = prompt.encode(tokenizer, generate=generate).input_ids
    return positions(ids, prompt.visuals, config, tokens) < config.positions


def say_unanswered(what: str, count: int, total: int, config: ModelConfig) -> None:
    """Tell the terminal of questions that are too long; `what` names who was asked."""
    if count:
        say(
            f"{what}: {count} of {total} questions are too long for the decoder's {config.positions} positions and "
            "stay without an answer"
        )
