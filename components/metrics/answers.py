"""Answers of a torch model to held-out questions: with the right picture, a blank one, or another sample's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from nvila.components.contracts.progress import track
from nvila.components.data.samples import Sample, Turn
from nvila.components.model.decode.answer import generate
from nvila.components.model.decode.room import leaves_room, say_unanswered
from nvila.components.model.feed import Feed
from nvila.components.model.nvila import NVILA
from nvila.components.model.text.prompt import Prompt
from nvila.components.model.text.tokenizer import TokenIds
from nvila.components.model.vision.preprocess import blank

Show = Literal["own", "blank", "other"]


@dataclass
class Questions:
    """Held-out samples with their media preprocessed once for all models."""

    samples: list[Sample]
    shown: dict[tuple[str, ...], Prompt]
    """A prompt with the tiles of each picture or clip, by the places of its media: sources may call theirs alike."""

    @classmethod
    def prepare(cls, samples: list[Sample], feed: Feed) -> Questions:
        """Decode and preprocess each picture or clip once, however many questions ask about it."""
        distinct = {_places(sample): sample for sample in samples}
        what = f"{samples[0].source} pictures" if samples else "pictures"
        return cls(samples, {media: feed.prompt(sample) for media, sample in track(distinct.items(), what)})

    def prompts(self, show: Show, limit: int | None = None) -> list[Prompt]:
        """Prompts for the first `limit` questions, each with the picture that `show` says."""
        chosen = self.samples[:limit]
        media = [_places(sample) for sample in chosen]
        if show == "other":
            media = _displaced(media)
        prompts = []
        for sample, name in zip(chosen, media, strict=True):
            prompt = replace(self.shown[name], turns=_question(sample))
            if show == "blank":
                prompt = replace(prompt, visuals=[blank(visual) for visual in prompt.visuals])
            prompts.append(prompt)
        return prompts


def answers(
    model: NVILA, tokenizer: Any, prompts: Sequence[Prompt], *, batch: int, max_new_tokens: int, what: str
) -> list[str]:
    """Greedy answers, in order; `what` names the work in the progress display.

    A question that fills all positions of the decoder has none (`room.leaves_room`): its answer is empty, which is
    as wrong as it will be once the model is served.
    """
    tokens = TokenIds.of(tokenizer, model.config.video_texts)
    fitting = [i for i, prompt in enumerate(prompts) if leaves_room(prompt, tokenizer, model.config, tokens)]
    say_unanswered(what, len(prompts) - len(fitting), len(prompts), model.config)
    found = [""] * len(prompts)
    model.eval()
    for start in track(range(0, len(fitting), batch), what):
        some = fitting[start : start + batch]
        said = generate(model, tokenizer, [prompts[i] for i in some], max_new_tokens=max_new_tokens)
        for i, text in zip(some, said, strict=True):
            found[i] = text
    return found


def _places(sample: Sample) -> tuple[str, ...]:
    return tuple(str(sample.root / name) for name in sample.media)


def _question(sample: Sample) -> list[Turn]:
    """The conversation up to the answer that is asked for."""
    return [sample.conversations[0]]


def _displaced(media: list[tuple[str, ...]]) -> list[tuple[str, ...]]:
    """Each sample gets another sample's picture: the one half the list away, or the next that differs."""
    n = len(media)
    shown = []
    for i, own in enumerate(media):
        candidates = (media[(i + n // 2 + k) % n] for k in range(n))
        shown.append(next((other for other in candidates if other != own), own))
    return shown
