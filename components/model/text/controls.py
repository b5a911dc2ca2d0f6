"""Text stays text: what a tokenizer would read as a control token is broken up in prompts, and mended in answers.

A zero width space goes behind the first character of each control string. Nothing is taken away, so that no new one
can arise, and a chat template in Jinja can do the same (`jinja`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

IMAGE_TOKEN, VIDEO_TOKEN, SENTINEL_TOKEN = "<image>", "<vila/video>", "<vila/sentinel>"
MARKERS = (SENTINEL_TOKEN, IMAGE_TOKEN, VIDEO_TOKEN)
"""Tokens added to a saved tokenizer at load time, in the order of their ids, which is the reference's."""
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "[BOS]", "[PAD]")
"""Special tokens of a tokenizer that is made here, in the order of their ids behind the byte-pair vocabulary."""
BREAK = "\u200b"
CONTROLS = (
    *SPECIAL,
    *(f"<|{name}_{edge}|>" for name in ("object_ref", "box", "quad", "vision") for edge in ("start", "end")),
    *(f"<|{name}_pad|>" for name in ("vision", "image", "video")),
    *MARKERS,
)
"""Broken up whatever the tokenizer: the special tokens of Qwen2 and Qwen2.5, of ours, and the markers of media.

Added tokens that are not special, such as `<tool_call>` and the time tokens, are ordinary vocabulary.
"""


def control_strings(tokenizer: Any) -> tuple[str, ...]:
    """`CONTROLS` and the special tokens that this tokenizer has beside them."""
    added = sorted(tokenizer.added_tokens_decoder.items())
    own = (token.content for _, token in added if token.special)
    return tuple(dict.fromkeys((*CONTROLS, *own, *tokenizer.all_special_tokens)))


def break_up(text: str, controls: Sequence[str] = CONTROLS) -> str:
    """`text` without any of `controls`: each has a zero width space behind its first character."""
    for control in controls:
        text = text.replace(control, _broken(control))
    return text


def mend(text: str, controls: Sequence[str] = CONTROLS) -> str:
    """What was meant by an answer: the control strings in it that `break_up` broke up, whole again."""
    for control in controls if BREAK in text else ():
        text = text.replace(_broken(control), control)
    return text


def settled(text: str, controls: Sequence[str] = CONTROLS) -> str:
    """The beginning of a growing text that mending will not change any more, whatever follows."""
    at = text.rfind(BREAK)
    tail = text[max(at - 1, 0) :]
    unfinished = at > 0 and any(len(tail) < len(c) + 1 and _broken(c).startswith(tail) for c in controls)
    return text[:at] if unfinished else text


def _broken(control: str) -> str:
    return control[0] + BREAK + control[1:]
