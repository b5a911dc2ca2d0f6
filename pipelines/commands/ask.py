"""`nvila infer`: questions to a model loaded in this process, without a server."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from nvila.components.contracts.environment import before_importing
from nvila.components.contracts.errors import ConfigError
from nvila.components.tracking.checkpoints import find_model

if TYPE_CHECKING:
    from nvila.components.model.config.config import ModelConfig


@dataclass(frozen=True)
class Question:
    """What is asked of a model."""

    texts: Sequence[str]
    """One human turn each; `<image>` and `<vila/video>` in them say where media stand."""
    media: Sequence[tuple[Literal["image", "video"], Path]] = ()
    """Pictures and clips in order; a folder of frames is a clip, and each page of a PDF a picture (`x.pdf#page=3` names
    one). A place in a text is that of the next one of its kind; those without a place come first."""
    system: str | None = None
    """System prompt; None is the template's own."""


@dataclass(frozen=True)
class Answering:
    """How answers are made."""

    max_new_tokens: int = 64
    options: dict[str, Any] = field(default_factory=dict)
    """`temperature`, `top_p` and `seed` of `NVILA.stream`."""
    json_schema: Path | None = None
    """A file; each answer is JSON of this schema."""


def infer(reference: str, question: Question, answering: Answering, runs: Path) -> Iterator[str | None]:
    """The answers in pieces as they are made, None behind each.

    Each text is asked in turn, with the turns before it and the media that have their place up to there.

    Raises:
        ConfigError: no such model, a schema that cannot be kept, or an answer was cut before its JSON ended.
        DataError: a picture, clip or document cannot be read, or is of a kind that the texts have no place for.
    """
    folder = find_model(reference, runs).folder
    pages = _pages(question)  # before a model is loaded: what is refused is refused at once
    before_importing("transformers")

    from nvila.components.model.checkpoint.loading import load
    from nvila.components.model.decode.answer import stream
    from nvila.components.model.decode.structured import JsonSchema
    from nvila.components.model.text.conversation import Turn, arranged, count_literals, split_media
    from nvila.components.model.text.prompt import make_prompt

    loaded, tokenizer = load(folder)
    options = dict(answering.options)
    if answering.json_schema is not None:
        options["schema"] = JsonSchema.read(tokenizer, answering.json_schema)
    media = _media(question, pages, loaded.config)
    asked = [Turn("human", text) for text in question.texts]
    places = sum(count_literals(turn) for turn in asked)
    if 0 < len(media) < places:  # without any, they are text
        raise ConfigError("the questions have more places for media than there are media", value=(places, len(media)))
    front, placed = split_media(asked, arranged(asked, media))
    turns: list[Turn] = []
    for turn in asked:
        turns.append(turn)
        so_far = sum(count_literals(earlier) for earlier in turns)
        prompt = make_prompt(tuple(turns), [*front, *placed[:so_far]], loaded.config, system=question.system)
        pieces = []
        for piece in stream(loaded, tokenizer, prompt, answering.max_new_tokens, **options):
            pieces.append(piece)
            yield piece
        turns.append(Turn("gpt", "".join(pieces)))
        yield None
        if answering.json_schema is not None:
            _check_complete(turns[-1].text, answering.max_new_tokens)


def whole(pieces: Iterable[str | None]) -> list[str]:
    """The answers of `infer`, one text each."""
    answers = [""]
    for piece in pieces:
        if piece is None:
            answers.append("")
        else:
            answers[-1] += piece
    return answers[:-1]


def _pages(question: Question) -> dict[Path, list[Any]]:
    """The pages of the documents, as pictures."""
    from nvila.components.data.pdf import is_pdf, load_pages

    return {path: load_pages(path) for kind, path in question.media if kind == "image" and is_pdf(path)}


def _media(
    question: Question, pages: Mapping[Path, list[Any]], config: ModelConfig
) -> list[tuple[Literal["image", "video"], Any]]:
    """The media, decoded within the default `Limits`: pictures, and lists of frames."""
    from nvila.components.model.vision.media import load_medium

    media: list[tuple[Literal["image", "video"], Any]] = []
    for kind, path in question.media:
        rendered = pages.get(path) if kind == "image" else None
        media += [(kind, medium) for medium in rendered or [load_medium(path, kind, config)]]
    return media


def _check_complete(answer: str, max_new_tokens: int) -> None:
    try:
        json.loads(answer)
    except ValueError:
        raise ConfigError(
            "the answer was cut before its JSON ended",
            where="--max-new-tokens",
            value=max_new_tokens,
            do="Allow longer answers",
        ) from None
