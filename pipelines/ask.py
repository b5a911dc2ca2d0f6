"""`nvila infer`: questions to a model loaded in this process, without a server."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from nvila.pipelines.models import find_model


@dataclass(frozen=True)
class Question:
    """What is asked of a model."""

    texts: Sequence[str]
    """One human turn each; `<image>` and `<vila/video>` in them say where media stand."""
    media: Sequence[tuple[Literal["image", "video"], Path]] = ()
    """Pictures and clips in order; a folder of frames is a clip. Those without a place in a text come first."""
    system: str | None = None
    """System prompt; None is the template's own."""


@dataclass(frozen=True)
class Answering:
    """How answers are made."""

    max_new_tokens: int = 64
    options: dict[str, Any] = field(default_factory=dict)
    """`temperature`, `top_p` and `seed` of `NVILA.stream`."""


def infer(reference: str, question: Question, answering: Answering, runs: Path) -> Iterator[str]:
    """The answers in pieces as they are made, a line break behind each.

    Each text is asked in turn, with the turns before it and the media that have their place up to there.

    Raises:
        ConfigError: no such model.
        DataError: a picture or clip cannot be read.
    """
    folder = _folder(reference, runs)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # read when it is imported

    from nvila.components.data.media import load_image, load_video_frames
    from nvila.components.model.conversation import Turn, count_literals, split_media
    from nvila.components.model.loading import load
    from nvila.components.model.prompt import make_prompt

    loaded, tokenizer = load(folder)
    frames = loaded.config.num_video_frames
    media: list[Any] = [
        load_image(path) if kind == "image" else load_video_frames(path, frames) for kind, path in question.media
    ]
    asked = [Turn("human", text) for text in question.texts]
    front, placed = split_media(asked, media)
    turns: list[Turn] = []
    for turn in asked:
        turns.append(turn)
        so_far = sum(count_literals(earlier) for earlier in turns)
        prompt = make_prompt(tuple(turns), [*front, *placed[:so_far]], loaded.config, system=question.system)
        pieces = []
        for piece in loaded.stream(tokenizer, prompt, answering.max_new_tokens, **answering.options):
            pieces.append(piece)
            yield piece
        turns.append(Turn("gpt", "".join(pieces)))
        yield "\n"


def _folder(reference: str, runs: Path) -> Path:
    if "://" not in reference:
        return find_model(reference, runs.absolute()).folder
    from nvila.components.data.fetch import fetch

    return fetch(reference)
