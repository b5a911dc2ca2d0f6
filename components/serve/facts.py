"""What a request is judged by: facts of the served model, and which grammars answers can be held to."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nvila.components.contracts.foreign import read_object
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
    controls: tuple[str, ...] = CONTROLS
    """What is broken up in texts."""
    markers: frozenset[int] = frozenset()
    """Ids that stand for media; no prompt may name them itself."""
    tokens: Callable[[], Any] = field(default=lambda: None, repr=False)
    """The vocabulary as llguidance takes it; made at the first call, which takes most of a second."""

    @classmethod
    def of(cls, model_dir: Path) -> Facts:
        """Read them.

        Raises:
            DataError: the folder is damaged.
        """
        config = read_object(model_dir / "config.json")
        tokenizer = load_tokenizer(model_dir)
        return cls(
            vocabulary=config["text_config"]["vocab_size"],
            context=tokenizer.model_max_length,
            longest=max(map(len, tokenizer.get_vocab())),
            controls=control_strings(tokenizer),
            markers=frozenset(tokenizer.convert_tokens_to_ids(list(MARKERS))),
            tokens=_Once(lambda: _tokens(tokenizer)),
        )


def _tokens(tokenizer: Any) -> Any:
    from llguidance.hf import from_tokenizer

    return from_tokenizer(tokenizer)


class _Once:
    """A function whose result is kept."""

    def __init__(self, make: Callable[[], Any]) -> None:
        self._make, self._made, self._lock = make, None, threading.Lock()

    def __call__(self) -> Any:
        with self._lock:
            if self._made is None:
                self._made = self._make()
            return self._made
