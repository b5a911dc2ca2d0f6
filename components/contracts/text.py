"""Text from outside made fit to be shown: nothing in it may steer a terminal, or run in a shell it is pasted into."""

from __future__ import annotations

import os
import shlex
import sys
import unicodedata
from collections.abc import Sequence

_JOINERS = "\u200c\u200d"
"""Zero-width signs that writing needs: Persian and Indic words, emoji of several people."""


def visible(text: str) -> str:
    """`text` on one line, with what is no sign of writing as an escape (`\\x1b`, `\\n`, `\\u202e`).

    Terminals obey control characters, and signs that turn the direction of writing make a text look like another one.
    """
    return text if text.isascii() and text.isprintable() else "".join(map(_visible, text))


def visible_lines(text: str) -> str:
    """Like `visible`, but line breaks and tabs stay."""
    return "\n".join("\t".join(map(visible, line.split("\t"))) for line in text.split("\n"))


def brief(text: str, most: int = 80) -> str:
    """`text` on one line as a message may have it: the middle of a long one is left out."""
    if len(text) > most:
        half = most // 2
        text = f"{text[: most - half]} ... {text[-half:]} ({len(text):,} characters)"
    return visible(text)


def duration(seconds: float) -> str:
    """`0.4 s`, `12 s`, `3 min 07 s`, `2 h 05 min`."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def as_many(lines: Sequence[str], room: int) -> list[str]:
    """The first of `lines` that together have at most `room` characters (one at least), and how many more there are."""
    shown, used = list[str](), 0
    for line in lines:
        if shown and (used := used + len(line)) > room:
            return [*shown, f"and {len(lines) - len(shown)} more"]
        shown.append(line)
    return shown


def say(text: str) -> None:
    """Tell the person at the terminal, or the log, a line on stderr; names of files and messages of servers as well."""
    print(visible_lines(text), file=sys.stderr, flush=True)


def shell_word(text: str) -> str:
    """`text` as one word of a shell's command line that shows what it is: control characters are escapes in it too.

    Other shells than bash, ksh and zsh do not know the form that such a text needs.
    """
    if visible(text) == text:
        return shlex.quote(text)
    return f"$'{''.join(map(_in_ansi_quotes, text))}'"


def _visible(character: str) -> str:
    if character.isprintable() or character in _JOINERS or unicodedata.category(character) == "Zs":
        return character
    return character.encode("unicode_escape").decode("ascii")


def _in_ansi_quotes(character: str) -> str:
    if _visible(character) == character and character not in "\\'!":  # an interactive bash reads `!` almost anywhere
        return character
    return "".join(f"\\x{byte:02x}" for byte in os.fsencode(character))
