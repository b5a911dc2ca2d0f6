"""Time tokens `<t0>`, `<t1>`, ... that divide a video evenly, and a loss that knows their order; `llava/model/loss.py`.

They are ordinary tokens of the saved vocabulary: before stage 5 they are added with `add_time_tokens`, and from then
on found by their names.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count, takewhile
from typing import Any

import torch
from torch.nn import functional as F

from nvila.components.contracts.errors import ConfigError
from nvila.components.model.text.conversation import Turn, TurnLike

TIME_FORMAT = "<t{t}>"
_TOKEN = re.compile(r"<t(0|[1-9][0-9]{0,17})>")
"""As `TIME_FORMAT` writes it: `<t07>` is text."""
_BEGUN = re.compile(r"<(t[0-9]*)?\Z")
_SECONDS = re.compile(r"<(\d*\.\d+|\d+\.?)>")


def time_token_ids(tokenizer: Any) -> tuple[int, ...]:
    """Ids of `<t0>`, `<t1>`, ... as far as the vocabulary has them without a gap.

    Raises:
        ConfigError: they are special tokens: texts could not say them, and answers would be shown without.
    """
    vocabulary, added = tokenizer.get_vocab(), tokenizer.added_tokens_decoder
    names = list(takewhile(vocabulary.__contains__, (TIME_FORMAT.format(t=t) for t in count())))
    if special := [name for name in names if (token := added.get(vocabulary[name])) and token.special]:
        raise ConfigError(
            "time tokens are special tokens of this tokenizer",
            where="tokenizer.json: added_tokens",
            value=special[:5],
            do='Set `"special": false` for them there and in tokenizer_config.json, as the reference adds them',
        )
    return tuple(vocabulary[name] for name in names)


def add_time_tokens(tokenizer: Any, number: int) -> None:
    """Add `<t0>` to `<t{number - 1}>` to a saved tokenizer, in place, before the media markers are.

    Raises:
        ConfigError: the tokenizer has the media markers, which must stay the last tokens.
    """
    if "<image>" in tokenizer.get_vocab():
        raise ConfigError("time tokens come before the media markers", do="Add them to the tokenizer as it is saved")
    tokenizer.add_tokens([TIME_FORMAT.format(t=t) for t in range(number)])


def soft_cross_entropy(
    logits: torch.Tensor, targets: torch.Tensor, time_ids: Sequence[int], std: float = 1.0
) -> torch.Tensor:
    """Cross-entropy of each token, where a time token's target is spread over its neighbours in time.

    The target of time token t is p_j proportional to exp(-(id_t - id_j)^2 / (2 std^2)) over all time tokens j; other
    tokens have the usual one.

    Args:
        logits: (n, V).
        targets: (n,) token ids, none ignored.
        time_ids: ids of the time tokens.
        std: in token ids.

    Returns:
        (n,) in the dtype of `logits`; their mean is the loss.
    """
    losses = F.cross_entropy(logits, targets, reduction="none")
    times = torch.tensor(list(time_ids), device=targets.device)
    timed = torch.isin(targets, times)
    distance = (targets[timed, None] - times).to(logits.dtype)
    wanted = torch.softmax(-(distance**2) / (2 * std**2), dim=-1)
    soft = -(wanted * torch.log_softmax(logits[timed], dim=-1)[:, times]).sum(-1)
    return losses.index_put((timed,), soft)


def to_seconds(text: str, duration_seconds: float, number: int) -> str:
    """`<t3>` in an answer to `<1.5>`: seconds with at most two decimals; what lies behind the end is the end.

    Args:
        text: an answer.
        duration_seconds: of the video.
        number: of time tokens; the last stands for the end, and so does a single one.
    """
    end = float(duration_seconds)

    def seconds(match: re.Match[str]) -> str:
        t = int(match[1])
        return f"<{round(t * end / (number - 1) if t < number and number > 1 else end, 2)}>"

    return _TOKEN.sub(seconds, text)


def to_time_tokens(text: str, duration_seconds: float, number: int) -> str:
    """`<1.5>` in a question or training answer to the nearest time token, halves to even; the inverse of `to_seconds`.

    Without time tokens the text stays as it is.
    """
    if number < 1:
        return text

    def token(match: re.Match[str]) -> str:
        share = float(match[1]) / duration_seconds if duration_seconds else 0.0
        return TIME_FORMAT.format(t=round(min(share, 1.0) * (number - 1)))

    return _SECONDS.sub(token, text)


@dataclass(frozen=True)
class Times:
    """What times are in a clip: `<1.5>` seconds to whoever asks, `<t3>` to the model."""

    seconds: float
    """Of the whole clip."""
    number: int
    """Of time tokens."""

    def in_turns(self, turns: Sequence[TurnLike]) -> list[Turn]:
        """The turns with time tokens in place of seconds."""
        return [Turn(turn.role, to_time_tokens(turn.text, self.seconds, self.number)) for turn in turns]

    def said(self, text: str, *, whole: bool = True) -> str:
        """An answer with seconds in place of time tokens; of one that goes on, what may be the beginning of a token is
        left out."""
        return to_seconds(text if whole else self.open(text), self.seconds, self.number)

    def open(self, text: str) -> str:
        """A text that goes on, without what may be the beginning of a time token."""
        return _BEGUN.sub("", text)


def times_of(number: int, clips: Sequence[float | None]) -> Times | None:
    """What times are in a conversation about clips of these lengths, with so many time tokens.

    None where there are no time tokens, and where not one clip is shown whose length is known: then seconds are text.
    """
    return Times(clips[0], number) if number and len(clips) == 1 and clips[0] else None


def check_time_tokens(tokens: Sequence[int], number: int) -> None:
    """Whether the vocabulary has the time tokens that a configuration speaks of.

    Args:
        tokens: ids of those that it has.
        number: of `num_time_tokens` or `time_token_ids`; 0 says nothing.

    Raises:
        ConfigError: it has fewer or more, so the seconds of an answer would be others.
    """
    if number and len(tokens) != number:
        raise ConfigError(
            f"the vocabulary has {len(tokens)} time tokens",
            where="config.json: num_time_tokens, time_token_ids",
            value=number,
            do="Use the tokenizer that the model was trained with, or correct the number",
        )
