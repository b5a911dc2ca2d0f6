"""Conversations to token ids and labels in Qwen2's chat template; spec section 1.10.

Media stay single marker tokens here; `splice` puts their embeddings in place later.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from nvila.components.contracts.errors import DataError

IMAGE_TOKEN, VIDEO_TOKEN, SENTINEL_TOKEN = "<image>", "<vila/video>", "<vila/sentinel>"
MARKERS = (SENTINEL_TOKEN, IMAGE_TOKEN, VIDEO_TOKEN)
"""Tokens added to a saved tokenizer at load time, in the order of their ids (section 1.4)."""
SYSTEM = "You are a helpful assistant"
IGNORED = -100
"""Label of a position that is not supervised."""

_MARKER = re.compile(f"({IMAGE_TOKEN}|{VIDEO_TOKEN})\n?")
_ROLES = {"human": "user", "gpt": "assistant", "user": "user", "assistant": "assistant"}


class TurnLike(Protocol):
    """A turn of a conversation, as data.samples and this module have it."""

    @property
    def role(self) -> str: ...  # noqa: D102
    @property
    def text(self) -> str: ...  # noqa: D102


@dataclass(frozen=True)
class Turn:
    """One turn: role "human" or "gpt", and its text."""

    role: str
    text: str


@dataclass(frozen=True)
class Encoded:
    """Token ids of a conversation and, for each, its label or -100."""

    input_ids: list[int]
    labels: list[int] = field(repr=False)


def render(
    turns: Sequence[TurnLike],
    *,
    system: str | None = None,
    generate: bool = False,
    markers: Sequence[str] | None = None,
) -> str:
    """The conversation as one text.

    Args:
        turns: human and gpt turns.
        system: system prompt; None takes the template's own, "" gives an empty one.
        generate: end with the opening of the assistant's turn.
        markers: what stands for each medium, see `place_media`.
    """
    return "".join(text for text, _ in _segments(turns, system, generate, markers))


def encode(
    tokenizer: Any,
    turns: Sequence[TurnLike],
    *,
    system: str | None = None,
    generate: bool = False,
    markers: Sequence[str] | None = None,
) -> Encoded:
    """Token ids and labels: every token of each answer and its `<|im_end|>` is supervised, nothing else.

    Arguments as of `render`. An answer is a segment of its own, so that its labels need no matching of rendered texts.
    """
    segments = list(_segments(turns, system, generate, markers))
    pieces = tokenizer([text for text, _ in segments], add_special_tokens=False)["input_ids"]
    input_ids: list[int] = []
    labels: list[int] = []
    for (_, supervised), piece in zip(segments, pieces, strict=True):
        input_ids += piece
        labels += piece if supervised else [IGNORED] * len(piece)
    return Encoded(input_ids, labels)


def place_media(turns: Iterable[TurnLike], markers: Sequence[str] | None) -> list[Turn]:
    """Strip each turn and settle where media stand.

    Args:
        turns: literal `<image>` and `<vila/video>` in human turns say where; a line break behind them is dropped.
        markers: the text for each medium, in order. Literals beyond them are removed; media without a literal go to
            the front of the first human turn. None keeps each literal as one medium.

    Returns:
        New turns without any other literal marker: user text cannot smuggle one in.
    """
    left = list(markers) if markers is not None else None
    placed = [Turn(_role(turn), _place(turn, left)) for turn in turns]
    if left:
        first = next((i for i, turn in enumerate(placed) if turn.role == "user"), None)
        if first is None:
            raise DataError("media but no human turn to put them in", value=left)
        placed[first] = Turn("user", "".join(left) + placed[first].text)
    return placed


def _place(turn: TurnLike, left: list[str] | None) -> str:
    def swap(match: re.Match[str]) -> str:
        if _role(turn) != "user":
            return ""
        if left is None:
            return match.group(1)
        return left.pop(0) if left else ""

    return _MARKER.sub(swap, turn.text.replace(SENTINEL_TOKEN, "")).strip()


def _role(turn: TurnLike) -> str:
    try:
        return _ROLES[turn.role]
    except KeyError:
        raise DataError("unknown role", value=turn.role, do="Use human or gpt") from None


def _segments(
    turns: Sequence[TurnLike], system: str | None, generate: bool, markers: Sequence[str] | None
) -> Iterator[tuple[str, bool]]:
    """Texts of the template with whether they are supervised; an answer runs to its `<|im_end|>`."""
    text = f"<|im_start|>system\n{SYSTEM if system is None else system.strip()}<|im_end|>\n"
    for turn in place_media(turns, markers):
        text += f"<|im_start|>{turn.role}\n"
        if turn.role == "assistant":
            yield text, False
            yield f"{turn.text}<|im_end|>", True
            text = "\n"
        else:
            text += f"{turn.text}<|im_end|>\n"
    yield text + ("<|im_start|>assistant\n" if generate else ""), False
