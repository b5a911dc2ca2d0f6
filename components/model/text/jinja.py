"""The chat template in Jinja, for those who do not have our code: written from a `Template`, and read back into one.

What is written renders as `conversation.render` does, markers and broken-up control strings included; vLLM and
transformers run it. What a foreign checkpoint brings is recognised by what it makes of a few short conversations.
"""

from __future__ import annotations

import json
import os
import re
import resource
import select
import signal
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache
from importlib import import_module
from pathlib import Path
from typing import Any

from nvila.components.contracts.errors import ConfigError
from nvila.components.contracts.foreign import read_text
from nvila.components.model.text.controls import BREAK, CONTROLS, IMAGE_TOKEN, MARKERS, VIDEO_TOKEN
from nvila.components.model.text.templates import QWEN2, Template

PICTURES, CLIPS = ("image", "image_url", "input_image"), ("video", "video_url", "input_video")
"""`type` of a content part that is a picture or a clip."""

MOST_CHARACTERS, MOST_SECONDS, MOST_BYTES = 2**18, 2, 2**28
"""Of a template, and of the fork that reads it; ours have 3,000 characters and take 0.02 seconds."""
REFERENCE_NAME = "qwen2"
"""`chat_template` of a config.json by which the reference takes its own file of `QWEN2`."""


def chat_template(
    template: Template = QWEN2,
    controls: Sequence[str] = CONTROLS,
    *,
    tile_breaks: bool = False,
    literal_media: bool = False,
) -> str:
    """A template that renders as `conversation.render`.

    A message's content is a text, which stays text, or a list of parts in their order: `{"type": "text", "text": ...}`
    and `{"type": "image"}` or `{"type": "video"}`. An unknown part or role is refused.

    Args:
        template: the texts around the turns.
        controls: what is broken up in texts, `controls.control_strings` of the tokenizer.
        tile_breaks: a picture that is the only one stands on a line of its own (`prompt.picture_marker`).
        literal_media: markers in a content that is one text are media. Only for the reference, which writes them there
            itself after it has removed those of the user.
    """
    known = {
        "CONTROLS": _list(controls),
        "WHOLE": _list([c for c in controls if c not in MARKERS]) if literal_media else "controls",
        "BREAK": _text(BREAK),
        "DEFAULT": _text(template.system_open + (template.system or "") + template.system_close),
        "SYSTEM_OPEN": _text(template.system_open),
        "SYSTEM_CLOSE": _text(template.system_close),
        "USER_OPEN": _text(template.user_open),
        "USER_CLOSE": _text(template.user_close),
        "ANSWER_OPEN": _text(template.answer_open),
        "ANSWER_END": _text(template.answer_end),
        "ANSWER_CLOSE": _text(template.answer_close),
        "PICTURES": _list(PICTURES),
        "CLIPS": _list(CLIPS),
        "IMAGE": _text(IMAGE_TOKEN),
        "LINE": _text(f"{IMAGE_TOKEN}\n"),
        "VIDEO": _text(VIDEO_TOKEN),
    }
    pieces = [_SETTINGS, _LINES if tile_breaks else "", _SYSTEM if template.system is not None else "", _MESSAGES]
    lines = (line.strip() for piece in pieces for line in piece.splitlines())
    return re.sub("@([A-Z_]+)", lambda match: known[match[1]], "".join(lines))


_SETTINGS = """
{% set pictures = @PICTURES %}
{% set clips = @CLIPS %}
{% set controls = @CONTROLS %}
{% set whole = @WHOLE %}
{% macro safe(text, controls) %}
    {% set s = namespace(text=text) %}
    {% for c in controls %}{% set s.text = s.text | replace(c, c[:1] ~ @BREAK ~ c[1:]) %}{% endfor %}
    {{ s.text }}
{% endmacro %}
{% macro behind(text, medium) %}
    {{ safe(text[1:] if medium and text[:1] == "\\n" else text, controls) }}
{% endmacro %}
{% set shown = namespace(pictures=0, marker=@IMAGE) %}
"""
_LINES = """
{% for m in messages %}
    {% if m['content'] is defined and m['content'] is not none and m['content'] is not string %}
        {% for part in m['content'] %}
            {% if part is mapping and part['type'] in pictures %}
                {% set shown.pictures = shown.pictures + 1 %}
            {% endif %}
        {% endfor %}
    {% endif %}
{% endfor %}
{% if shown.pictures == 1 %}{% set shown.marker = @LINE %}{% endif %}
"""
_SYSTEM = """
{% if messages[0]['role'] != 'system' %}{{ @DEFAULT }}{% endif %}
"""
_MESSAGES = """
{% for m in messages %}
    {% if m['content'] is defined and m['content'] is not none %}
        {% set p = namespace(body='', text='', medium=false) %}
        {% if m['content'] is string %}
            {% set p.body = safe(m['content'], whole) %}
        {% else %}
            {% for part in m['content'] %}
                {% if part is string %}
                    {% set p.text = p.text ~ part %}
                {% elif part['type'] == 'text' %}
                    {% set p.text = p.text ~ part['text'] %}
                {% elif part['type'] in pictures or part['type'] in clips %}
                    {% set marker = shown.marker if part['type'] in pictures else @VIDEO %}
                    {% set p.body = p.body ~ behind(p.text, p.medium) ~ marker %}
                    {% set p.text = '' %}
                    {% set p.medium = true %}
                {% else %}
                    {{ raise_exception('unknown content part: use text, image or video') }}
                {% endif %}
            {% endfor %}
        {% endif %}
        {% set body = (p.body ~ behind(p.text, p.medium)) | trim %}
        {% if m['role'] == 'system' %}
            {{ @SYSTEM_OPEN ~ body ~ @SYSTEM_CLOSE }}
        {% elif m['role'] == 'user' %}
            {{ @USER_OPEN ~ body ~ @USER_CLOSE }}
        {% elif m['role'] == 'assistant' %}
            {{ @ANSWER_OPEN ~ "" ~ body ~ @ANSWER_END ~ @ANSWER_CLOSE }}
        {% else %}
            {{ raise_exception('unknown role: use system, user or assistant') }}
        {% endif %}
    {% endif %}
{% endfor %}
{% if add_generation_prompt %}{{ @ANSWER_OPEN }}{% endif %}
"""
"""Texts are joined before they are broken up, as in `conversation`: two of them could make a control string. The empty
text of an answer stays: every checkpoint carries these bytes, and is known by their digest."""


def _text(value: str) -> str:
    """A Jinja literal of one line; the reference takes line breaks and runs of spaces out of the files it reads."""
    return json.dumps(value, ensure_ascii=False).replace("  ", " \\u0020").replace(BREAK, f"\\u{ord(BREAK):04x}")


def _list(values: Sequence[str]) -> str:
    return f"[{', '.join(_text(value) for value in values)}]"


def named_template(name: str, folder: Path) -> str:
    """The Jinja that `chat_template` of a checkpoint's config.json names: as the reference, its own file or one beside.

    Raises:
        ConfigError: there is no such template.
    """
    if name == REFERENCE_NAME:
        return chat_template()
    beside = folder / f"{Path(name).name}.jinja"
    if not os.path.lexists(beside):
        raise ConfigError("no such chat template", where=str(folder / "config.json"), value=name, do=_DO)
    return read_text(beside).replace("    ", "").replace("\n", "")


_DO = f"Set `chat_template` in config.json to {REFERENCE_NAME}, if the model was trained with it"
_Talk = list[tuple[str, str]]
_TALK: _Talk = [("user", "Why?"), ("assistant", "So."), ("user", "And now?"), ("assistant", "Not yet!")]


@lru_cache(maxsize=32)
def read_template(written: str, bos_token: str | None = None, eos_token: str | None = None) -> Template:
    """The `Template` that a Jinja text is, its default system prompt included.

    Rendered in the sandbox of transformers, like any chat template.

    Raises:
        ConfigError: `QWEN2` with its default system prompt does not render the same.
    """
    read = _bounded(_read, written, bos_token, eos_token) if len(written) <= MOST_CHARACTERS else None
    if read is None:
        raise ConfigError("a chat template that is not Qwen2's", where="chat_template", value=written[:120], do=_DO)
    return replace(QWEN2, system=read[0])


def _read(written: str, bos_token: str | None, eos_token: str | None) -> tuple[str | None] | None:
    """The default system prompt of a template that is Qwen2's; None for another."""
    special: dict[str, Any] = {"bos_token": bos_token or "", "eos_token": eos_token or ""}
    for parts in (False, True):
        asked = _render(written, _TALK[:1], None, True, parts, special)
        found = _with_its_system(asked) if asked is not None else None
        if found is not None and all(
            _render(written, talk, system, generate, parts, special) == _expected(found, talk, system, generate)
            for talk, system, generate in _PROBES
        ):
            return (found.system,)
    return None


def _bounded(function: Callable[..., Any], *arguments: Any) -> Any:
    """What a function returns, as JSON, in a fork with bounds; None where it does not end within them.

    A template may loop, or double a text, without end, and no sandbox counts that.
    """
    import_module("transformers.utils.chat_template_utils")  # once, and not in each fork
    out, into = os.pipe()
    child = os.fork()
    if not child:
        try:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
            for limit, most in (
                (resource.RLIMIT_CPU, MOST_SECONDS),
                (resource.RLIMIT_AS, _address_space() + MOST_BYTES),
            ):
                hard = resource.getrlimit(limit)[1]
                resource.setrlimit(limit, (most if hard == resource.RLIM_INFINITY else min(most, hard), hard))
            os.write(into, json.dumps(function(*arguments)).encode())
        finally:
            os._exit(0)
    os.close(into)
    try:
        with os.fdopen(out, "rb") as pipe:
            ready, _, _ = select.select([pipe], [], [], 4 * MOST_SECONDS)
            said = pipe.read() if ready else b""
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    return json.loads(said) if said else None


def _address_space() -> int:
    """Bytes of this process' memory, whatever of it was touched."""
    return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0]) * os.sysconf("SC_PAGE_SIZE")


_PROBES: list[tuple[_Talk, str | None, bool]] = [
    (_TALK[:1], "Be brief.", True),
    (_TALK[:3], None, True),
    (_TALK[:2], None, False),
    (_TALK, "Be brief.", False),
]


def _with_its_system(asked: str) -> Template | None:
    """`QWEN2` with the default system prompt that the rendered first question shows; None where it cannot be it."""
    bare = replace(QWEN2, system=None)
    question = _expected(bare, _TALK[:1], None, True)
    if asked == question:
        return bare
    head, tail = QWEN2.system_open, QWEN2.system_close + question
    if len(asked) < len(head) + len(tail) or not (asked.startswith(head) and asked.endswith(tail)):
        return None
    return replace(QWEN2, system=asked[len(head) : len(asked) - len(tail)])


def _expected(template: Template, talk: _Talk, system: str | None, generate: bool) -> str:
    return "".join(text for text, _ in template.segments(talk, system=system, generate=generate))


def _render(
    written: str, talk: _Talk, system: str | None, generate: bool, parts: bool, special: dict[str, Any]
) -> str | None:
    """What the Jinja makes of a conversation; None where it fails."""
    from transformers.utils.chat_template_utils import render_jinja_template

    turns = talk if system is None else [("system", system), *talk]
    messages: list[dict[str, Any]] = [
        {"role": role, "content": [{"type": "text", "text": text}] if parts else text} for role, text in turns
    ]
    try:
        rendered = render_jinja_template([messages], chat_template=written, add_generation_prompt=generate, **special)[
            0
        ]
    except Exception:  # a foreign template may raise anything
        return None
    return str(rendered[0])
