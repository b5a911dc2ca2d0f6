"""Conversations to token ids and labels in a chat template, Qwen2's by default.

The one place where a prompt is written: training, `infer`, evaluation, batches and the pinned prompts come here, and
the chat template in Jinja (`jinja`) says the same for the endpoint. Media stay single marker tokens; `splice` puts
their embeddings in place later.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any, Generic, Literal, Protocol, TypeVar

from nvila.components.contracts.errors import DataError
from nvila.components.model.text.controls import (
    CONTROLS,
    IMAGE_TOKEN,
    MARKERS,
    SENTINEL_TOKEN,
    VIDEO_TOKEN,
    break_up,
    control_strings,
    mend,
)
from nvila.components.model.text.templates import QWEN2, Template, template_of

__all__ = [
    "IGNORED",
    "IMAGE_TOKEN",
    "MARKERS",
    "SENTINEL_TOKEN",
    "VIDEO_TOKEN",
    "Encoded",
    "File",
    "Message",
    "Part",
    "Place",
    "Turn",
    "TurnLike",
    "arranged",
    "count_literals",
    "encode",
    "mend",
    "messages_of",
    "render",
    "split_media",
]

IGNORED = -100
"""Label of a position that is not supervised."""

T = TypeVar("T")
_LITERAL = re.compile(f"({IMAGE_TOKEN}|{VIDEO_TOKEN})")
_Kind = Literal["image", "video"]
File = tuple[_Kind, Path]
"""A picture or a clip."""
_KINDS: dict[str, _Kind] = {IMAGE_TOKEN: "image", VIDEO_TOKEN: "video"}
_ROLES = {"human": "user", "gpt": "assistant", "user": "user", "assistant": "assistant"}


class TurnLike(Protocol):
    """A turn of a conversation, as data.samples and this module have it."""

    @property
    def role(self) -> str: ...  # noqa: D102
    @property
    def text(self) -> str: ...  # noqa: D102


@dataclass(frozen=True)
class Turn:
    """One turn in the form of a record: role "human" or "gpt", and its text, in which literals stand for media."""

    role: str
    text: str


@dataclass(frozen=True)
class Place(Generic[T]):
    """Where a medium stands between the texts of a message."""

    medium: T
    """The medium, its file, or its marker."""


Part = str | Place[T]


@dataclass(frozen=True)
class Message(Generic[T]):
    """One turn taken apart: role "user" or "assistant", and texts and media in their order."""

    role: str
    parts: tuple[Part[T], ...]


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
    """The conversation as one text, with `controls.CONTROLS` broken up in what was said.

    Args:
        turns: human and gpt turns.
        system: system prompt; None takes the template's own, "" gives an empty one.
        generate: end with the opening of the assistant's turn.
        markers: the text for each medium, see `messages_of`; None takes each literal in a human turn for one medium.
        template: the texts around the turns.
    """
    return "".join(text for text, _ in _segments(turns, system, generate, markers, template, CONTROLS))


def encode(
    tokenizer: Any,
    turns: Sequence[TurnLike],
    *,
    system: str | None = None,
    generate: bool = False,
    markers: Sequence[str] | None = None,
    template: Template | None = None,
) -> Encoded:
    """Token ids and labels: every token of each answer and its end (`<|im_end|>`) is supervised, nothing else.

    Arguments as of `render`; the template is by default the tokenizer's (`templates.template_of`), and its special
    tokens are broken up too. An answer is a segment of its own, so that its labels need no matching of rendered texts.
    """
    template = template or template_of(tokenizer)
    segments = list(_segments(turns, system, generate, markers, template, control_strings(tokenizer)))
    pieces = tokenizer([text for text, _ in segments], add_special_tokens=False)["input_ids"]
    input_ids: list[int] = []
    labels: list[int] = []
    for (_, supervised), piece in zip(segments, pieces, strict=True):
        input_ids += piece
        labels += piece if supervised else [IGNORED] * len(piece)
    return Encoded(input_ids, labels)


def messages_of(turns: Sequence[TurnLike], media: Sequence[T]) -> list[Message[T]]:
    """Take turns in the form of a record apart.

    Args:
        turns: literal `<image>` and `<vila/video>` in human turns say where media stand; any other is text.
        media: the media in order, of any type. Where there are fewer literals, the first media come to the front of the
            first human turn; literals beyond them are text.

    Raises:
        DataError: media that have no place, or an unknown role.
    """
    front, placed = split_media(turns, media)
    left = iter(placed)
    messages: list[Message[T]] = []
    for turn in turns:
        role, text = _role(turn), turn.text
        if role == "assistant":
            messages.append(Message(role, (text,)))
            continue
        first, front = front, []
        pieces = _LITERAL.split(text.strip() if first else text)
        parts: list[Part[T]] = [Place(medium) for medium in first]
        for index, piece in enumerate(pieces):
            literal = index % 2 == 1
            medium = next(left, None) if literal else None
            parts.append(piece if medium is None else Place(medium))
        messages.append(Message(role, tuple(parts)))
    if front:
        raise DataError("media but no human turn to put them in", value=front)
    return messages


def split_media(turns: Iterable[TurnLike], media: Sequence[T]) -> tuple[list[T], list[T]]:
    """Media (or their markers) that stand in front of the conversation, and those that literals in it stand for."""
    front = max(0, len(media) - sum(count_literals(turn) for turn in turns))
    return list(media[:front]), list(media[front:])


def arranged(turns: Iterable[TurnLike], media: Sequence[tuple[_Kind, T]]) -> list[T]:
    """Media of both kinds in the order in which `messages_of` places them: a literal takes the next one of its kind.

    Raises:
        DataError: a literal has none of its kind left, and would take one of the other.
    """
    wanted = [_KINDS[literal] for turn in turns for literal in _literals(turn)]
    spare = Counter(kind for kind, _ in media)
    spare.subtract(wanted)
    front: list[T] = []
    left: dict[_Kind, list[T]] = {kind: [] for kind in _KINDS.values()}
    for kind, medium in media:
        (front if spare[kind] > 0 else left[kind]).append(medium)
        spare[kind] -= 1
    placed: list[T] = []
    for kind in wanted:
        if left[kind]:
            placed.append(left[kind].pop(0))
        elif front or any(left.values()):
            raise DataError(f"a question has a place for a medium of kind {kind} that is not given", value=wanted)
    return front + placed


def count_literals(turn: TurnLike) -> int:
    """Places for media in a turn: only human turns have any."""
    return len(_literals(turn))


def _literals(turn: TurnLike) -> list[str]:
    return _LITERAL.findall(turn.text) if _role(turn) == "user" else []


def _role(turn: TurnLike) -> str:
    try:
        return _ROLES[turn.role]
    except KeyError:
        raise DataError("unknown role", value=turn.role, do="Use human or gpt") from None


def _segments(
    turns: Sequence[TurnLike],
    system: str | None,
    generate: bool,
    markers: Sequence[str] | None,
    template: Template,
    controls: Sequence[str],
) -> Iterator[tuple[str, bool]]:
    """Texts of the template with whether they are supervised; an answer runs to its end token."""
    if markers is None:
        markers = [literal for turn in turns for literal in _literals(turn)]
    bodies = [(message.role, _body(message, controls)) for message in messages_of(turns, markers)]
    own = None if system is None else break_up(system, controls).strip()
    yield from template.segments(bodies, system=own, generate=generate)


def _body(message: Message[str], controls: Sequence[str]) -> str:
    """The text of a message. Neighbouring texts are joined before they are broken up; a line break behind a medium
    belongs to it."""
    pieces: list[str] = []
    for is_text, parts in groupby(message.parts, lambda part: isinstance(part, str)):
        if not is_text:
            pieces += [part.medium for part in parts if not isinstance(part, str)]
            continue
        text = "".join(part for part in parts if isinstance(part, str))
        pieces.append(break_up(text.removeprefix("\n") if pieces else text, controls))
    return "".join(pieces).strip()
