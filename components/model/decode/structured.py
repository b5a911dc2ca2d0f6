"""Answers that are JSON of a given schema: which tokens may come next, by the library llguidance.

`generation` asks before each token; everything else about choosing it stays there. A schema is untrusted: it is
compiled by the library with its limits, no reference to another document is fetched, and a keyword that cannot be
kept is refused.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from nvila.components.contracts.errors import ConfigError
from nvila.components.model.text.templates import stop_tokens

SPACING: Any = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
"""One way of spacing, so that a model cannot fill its answer with white space."""
MOST_BYTES = 2**20
"""Of a schema's file."""


class JsonSchema:
    """A schema compiled for one tokenizer; may be used for any number of answers."""

    def __init__(self, tokenizer: Any, schema: Mapping[str, Any]) -> None:
        """Compile.

        Raises:
            ConfigError: not a schema, or one that asks for what cannot be kept.
        """
        from llguidance import LLMatcher
        from llguidance.hf import from_tokenizer

        self._stop = sorted(stop_tokens(tokenizer))
        self._tokens = from_tokenizer(tokenizer, eos_token=self._stop)
        try:
            self._grammar = LLMatcher.grammar_from_json_schema(json.dumps(schema), defaults=SPACING)
            failed, said = LLMatcher.validate_grammar_with_warnings(self._grammar, self._tokens)
        except (TypeError, ValueError) as error:
            failed, said = True, [str(error)]
        if failed or said:
            raise ConfigError(
                "answers cannot be held to this JSON schema", where="json_schema", value="; ".join(said)[:500]
            )

    @classmethod
    def read(cls, tokenizer: Any, path: Path) -> JsonSchema:
        """The schema in a file.

        Raises:
            ConfigError: no such file, no JSON, or as of the constructor.
        """
        try:
            with path.open("rb") as file:
                text = file.read(MOST_BYTES + 1)
            if len(text) > MOST_BYTES:
                raise ValueError(f"more than {MOST_BYTES} bytes")
            schema = json.loads(text)
        except (OSError, ValueError, RecursionError) as error:
            said = getattr(error, "strerror", None) or str(error)
            raise ConfigError("the JSON schema cannot be read", where=str(path), value=said) from None
        return cls(tokenizer, schema)

    def begin(self, rows: int) -> Allowed:
        """What a batch of answers may consist of, from their first token on."""
        from llguidance import LLMatcher

        return Allowed([LLMatcher(self._tokens, self._grammar) for _ in range(rows)], self._stop)


class Allowed:
    """The state of a batch of answers under a schema."""

    def __init__(self, matchers: Sequence[Any], stop: Sequence[int]) -> None:
        self._matchers = matchers
        self._stop = list(stop)

    def mask(self, logits: torch.Tensor) -> torch.Tensor:
        """(B, V) logits with minus infinity at tokens that would leave the schema; a complete answer has to end."""
        masks = [self._allowed(matcher, logits.shape[1]) for matcher in self._matchers]
        return logits.masked_fill(~torch.stack(masks).to(logits.device), -torch.inf)

    def accept(self, tokens: torch.Tensor) -> None:
        """(B,) chosen tokens; those behind an answer's end say nothing."""
        for matcher, token in zip(self._matchers, tokens.tolist(), strict=True):
            if not matcher.is_stopped():
                matcher.consume_token(token)
                assert not matcher.is_error(), matcher.get_error()

    def _allowed(self, matcher: Any, vocabulary: int) -> torch.Tensor:
        if matcher.is_stopped():
            allowed = torch.zeros(vocabulary, dtype=torch.bool)
            allowed[self._stop] = True
            return allowed
        words = torch.frombuffer(bytearray(matcher.compute_bitmask()), dtype=torch.uint8)
        return (words[:, None] >> torch.arange(8, dtype=torch.uint8) & 1).flatten()[:vocabulary].bool()
