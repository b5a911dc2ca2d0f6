"""Conversations to token ids and labels in a chat template, Qwen2's by default.

Media stay single marker tokens here; `splice` puts their embeddings in place later.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

from nvila.components.contracts.errors import DataError
from nvila.components.model.templates import QWEN2, Template

IMAGE_TOKEN, VIDEO_TOKEN, SENTINEL_TOKEN = "<image>", "<vila/video>", "<vila/sentinel>"
MARKERS = (SENTINEL_TOKEN, IMAGE_TOKEN, VIDEO_TOKEN)
"""Tokens added to a saved tokenizer at load time, in the order of their ids, which is the reference's."""
IGNORED = -100
"""Label of a position that is not supervised."""

T = TypeVar("T")
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
    template: Template = QWEN2,
) -> str:
    """The conversation as one text.

    Args:
        turns: human and gpt turns.
        system: system prompt; None takes the template's own, "" gives an empty one.
        generate: end with the opening of the assistant's turn.
        markers: what stands for each medium, see `place_media`.
        template: the texts around the turns.
    """
    return "".join(text for text, _ in _segments(turns, system, generate, markers, template))


def encode(
    tokenizer: Any,
    turns: Sequence[TurnLike],
    *,
    system: str | None = None,
    generate: bool = False,
    markers: Sequence[str] | None = None,
    template: Template = QWEN2,
) -> Encoded:
    """Token ids and labels: every token of each answer and its end (`<|im_end|>`) is supervised, nothing else.

    Arguments as of `render`. An answer is a segment of its own, so that its labels need no matching of rendered texts.
    """
    segments = list(_segments(turns, system, generate, markers, template))
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
        markers: the text for each medium, in order. Literals beyond them are removed; where there are fewer literals
            than media, the first media go to the front of the first human turn. None keeps each literal as one medium.

    Returns:
        New turns without any other literal marker: user text cannot smuggle one in.
    """
    turns = list(turns)
    front, left = split_media(turns, markers) if markers is not None else ([], None)
    placed = [Turn(_role(turn), _place(turn, left)) for turn in turns]
    if front:
        first = next((i for i, turn in enumerate(placed) if turn.role == "user"), None)
        if first is None:
            raise DataError("media but no human turn to put them in", value=front)
        placed[first] = Turn("user", "".join(front) + placed[first].text)
    return placed


def split_media(turns: Iterable[TurnLike], media: Sequence[T]) -> tuple[list[T], list[T]]:
    """Media (or their markers) that stand in front of the conversation, and those that literals in it stand for."""
    front = max(0, len(media) - sum(count_literals(turn) for turn in turns))
    return list(media[:front]), list(media[front:])


def count_literals(turn: TurnLike) -> int:
    """Places for media in a turn: only human turns have any."""
    return len(_MARKER.findall(turn.text.replace(SENTINEL_TOKEN, ""))) if _role(turn) == "user" else 0


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
    turns: Sequence[TurnLike], system: str | None, generate: bool, markers: Sequence[str] | None, template: Template
) -> Iterator[tuple[str, bool]]:
    """Texts of the template with whether they are supervised; an answer runs to its end token."""
    prompt = template.system if system is None else system.strip()
    text = f"{template.system_open}{prompt}{template.system_close}"
    placed = place_media(turns, markers)
    for index, turn in enumerate(placed):
        if turn.role == "assistant":
            last = index == len(placed) - 1 and not generate
            yield text + template.answer_open, False
            yield f"{template.answer_lead}{turn.text}{(last and template.last_end) or template.answer_end}", True
            text = template.answer_close
        else:
            text += f"{template.user_open}{turn.text}{template.user_close}"
    yield text + (template.answer_open if generate else ""), False
