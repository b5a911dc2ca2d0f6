"""What a request is judged by: facts of the served model, and which grammars answers can be held to."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nvila.components.contracts.foreign import read_object
from nvila.components.data.sampling import Sampling
from nvila.components.model.config.config import ModelConfig
from nvila.components.model.text.controls import CONTROLS, MARKERS, control_strings
from nvila.components.model.text.tokenizer import load_tokenizer


@dataclass(frozen=True)
class Facts:
    """Of a serving folder."""

    vocabulary: int
    """Token ids below have a logit."""
    context: int
    """Most tokens of a prompt with its answer."""
    longest: int
    """Characters of the longest token: a text of more than `context` times as many is too long."""
    sampling: Sampling
    """Frames that the model takes of a clip."""
    controls: tuple[str, ...] = CONTROLS
    """What is broken up in texts."""
    markers: frozenset[int] = frozenset()
    """Ids that stand for media; no prompt may name them itself."""
    time_tokens: int = 0
    """Tokens for times in a clip."""
    tokens: Callable[[], Any] = field(default=lambda: None, repr=False)
    """The vocabulary as llguidance takes it; made at the first call, which takes most of a second."""

    @classmethod
    def of(cls, model_dir: Path) -> Facts:
        """Read them.

        Raises:
            DataError: the folder is damaged.
        """
        config = read_object(model_dir / "config.json")
        tokenizer, model = load_tokenizer(model_dir), ModelConfig.from_json(config["nvila"])
        return cls(
            vocabulary=config["text_config"]["vocab_size"],
            context=tokenizer.model_max_length,
            longest=max(map(len, tokenizer.get_vocab())),
            sampling=model.sampling,
            time_tokens=model.time_tokens,
            controls=control_strings(tokenizer),
            markers=frozenset(tokenizer.convert_tokens_to_ids(list(MARKERS))),
            tokens=tokens_of(tokenizer),
        )


def tokens_of(tokenizer: Any) -> Callable[[], Any]:
    """A function that makes the vocabulary for llguidance, once."""
    made: list[Any] = []
    lock = threading.Lock()

    def tokens() -> Any:
        from llguidance.hf import from_tokenizer

        with lock:
            if not made:
                made.append(from_tokenizer(tokenizer))
            return made[0]

    return tokens
