"""Answers that are JSON of a given schema: which tokens may come next, by the library llguidance.

`generation` asks before each token; everything else about choosing it stays there. A schema is untrusted: it is
compiled by the library with its limits, no reference to another document is fetched, and a keyword that cannot be
kept is refused. The endpoint refuses by the same rules (`serve.structured`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from nvila.components.contracts.errors import ConfigError
from nvila.components.model.text.controls import break_up, control_strings
from nvila.components.model.text.templates import stop_tokens
from nvila.components.model.text.tokenizer import TokenIds

SPACING: Any = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
"""One way of spacing, so that a model cannot fill its answer with white space."""
MOST_BYTES = 2**20
"""Of a schema's file."""
MOST_COUNT = 10_000
"""That a schema may count to: the library makes a symbol for each item, and a billion of them take all memory."""
FUEL = 100_000
"""Of the library, for the patterns of a grammar: a tenth of its own limit, and a refusal takes no second. A schema of
300 properties with patterns needs less."""
STEPS = 16
"""Tokens of a trial answer: what can be kept at all mostly shows at its beginning."""


class JsonSchema:
    """A schema compiled for one tokenizer; may be used for any number of answers."""

    def __init__(self, tokenizer: Any, schema: Mapping[str, Any]) -> None:
        """Compile.

        Raises:
            ConfigError: not a schema, or one that asks for what cannot be kept.
        """
        from llguidance.hf import from_tokenizer

        self._stop = sorted(stop_tokens(tokenizer))
        self._tokens = from_tokenizer(tokenizer, eos_token=self._stop)
        try:
            self._grammar = schema_grammar(prepared(schema, control_strings(tokenizer)))
            require_keepable(self._grammar, self._tokens, TokenIds.of(tokenizer).vocabulary)
        except (TypeError, ValueError) as error:
            raise ConfigError(
                "answers cannot be held to this JSON schema", where="json_schema", value=str(error)[:500]
            ) from None

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


def prepared(schema: Any, controls: Sequence[str]) -> dict[str, Any]:
    """A schema whose answers are spaced in one way, and in which control strings are broken up, as in all texts.

    Raises:
        ValueError: not an object, or it counts beyond `MOST_COUNT`.
    """
    if not isinstance(schema, Mapping):
        raise ValueError("a JSON schema is an object")
    return {**_prepared(schema, controls), "x-guidance": SPACING}


def _prepared(value: Any, controls: Sequence[str]) -> Any:
    if isinstance(value, str):
        return break_up(value, controls)
    if isinstance(value, Mapping):
        for name in _COUNTS & value.keys():
            if isinstance(value[name], int | float) and value[name] > MOST_COUNT:
                raise ValueError(f"{name} is at most {MOST_COUNT}")
        return {break_up(key, controls): _prepared(inner, controls) for key, inner in value.items()}
    return [_prepared(inner, controls) for inner in value] if isinstance(value, list | tuple) else value


_COUNTS = {"minItems", "maxItems", "minLength", "minProperties", "maxProperties"}


def schema_grammar(schema: Mapping[str, Any]) -> str:
    """The grammar of a prepared schema.

    Raises:
        ValueError: not a schema.
    """
    from llguidance import LLMatcher

    return str(LLMatcher.grammar_from_json_schema(json.dumps(schema)))


def require_keepable(grammar: str, tokens: Any, vocabulary: int) -> None:
    """Return where answers can be held to a grammar: nothing of it is left out, and a trial answer begins.

    Args:
        grammar: of llguidance.
        tokens: the vocabulary as llguidance takes it.
        vocabulary: ids below have a logit.

    Raises:
        ValueError: they cannot, and why.
    """
    from llguidance import LLMatcher, LLParserLimits

    limits = LLParserLimits(initial_lexer_fuel=FUEL)
    failed, said = LLMatcher.validate_grammar_with_warnings(grammar, tokens, limits=limits)
    if failed or said:
        raise ValueError("; ".join(said))
    matcher = LLMatcher(tokens, grammar, log_level=0, limits=limits)
    for step in range(STEPS):
        if matcher.is_stopped():
            return
        mask = matcher.compute_bitmask()
        if matcher.is_stopped() and not step and not matcher.is_accepting():
            raise ValueError("no answer has this form; does it refer to itself without end?")
        token = next((i for i in range(vocabulary) if mask[i // 8] >> (i % 8) & 1), None)
        if token is None or not matcher.consume_token(token):
            raise ValueError((matcher.get_error().splitlines() or ["an answer cannot go on"])[0])


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
