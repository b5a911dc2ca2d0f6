"""Messages of a conversation, taken apart and put together from what is known: texts, pictures and clips in order.

Only fields that are named here go on: a part's `uuid`, say, would be vLLM's cache key, and one client's would show
another's picture. What an address may be is the media connector's business.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from nvila.components.serve.refusal import Refusal, nearest, shown

ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
TEXTS = ("text", "input_text", "output_text")
MEDIA = {
    **dict.fromkeys(("image_url", "input_image", "image"), "image_url"),
    **dict.fromkeys(("video_url", "input_video", "video"), "video_url"),
}
"""`type` of a part, and what vLLM calls it."""
_IGNORED = {"name", "refusal", "annotations", "reasoning", "reasoning_content", "cache_control", "id", "status"}
"""Of messages and parts: what an answer that is sent back has beside its text."""
_NO_TOOLS = {"tool_calls", "function_call", "audio", "tool_call_id"}


@dataclass
class Found:
    """What the messages of a request hold."""

    media: int = 0
    """Pictures and clips; the frames of a clip that comes as frames count one by one."""
    characters: int = 0


def chat_messages(messages: Sequence[Any], found: Found) -> list[dict[str, Any]]:
    """Messages of `/v1/chat/completions`.

    Raises:
        Refusal: a message that is not one, or holds what the model does not take.
    """
    return [_message(message, f"messages.{index}", found, _part) for index, message in enumerate(messages)]


def anthropic_messages(messages: Sequence[Any], found: Found) -> list[dict[str, Any]]:
    """Messages of `/v1/messages`; errors as of `chat_messages`."""
    return [_message(message, f"messages.{index}", found, _block) for index, message in enumerate(messages)]


def system_text(system: Any, found: Found) -> Any:
    """`system` of `/v1/messages`: a text, or parts of texts."""
    return _content(system, "system", "system", found, _block)


def _message(message: Any, at: str, found: Found, part: Any) -> dict[str, Any]:
    if not isinstance(message, dict):
        raise Refusal(f"{at} is an object with role and content, not {shown(message)}", at)
    role = message.get("role")
    if not isinstance(role, str) or role not in ROLES:
        why = "; the model was not trained to call tools" if role in ("tool", "function") else ""
        raise Refusal(f"{at}.role is system, user or assistant, not {shown(role)}{why}", f"{at}.role")
    _require_known(message, {"role", "content"}, at)
    content = _content(message.get("content"), role, f"{at}.content", found, part)
    return {"role": role if part is _block else ROLES[role], "content": content}


def _require_known(given: dict[str, Any], known: set[str], at: str) -> None:
    for name, value in given.items():
        if name in known or name in _IGNORED:
            continue
        if name in _NO_TOOLS:
            if value not in (None, "", [], {}):
                raise Refusal(f"{at}.{name}: the model neither calls tools nor speaks", f"{at}.{name}")
        elif name != "uuid":
            raise Refusal(f"{at}.{name} is not known{nearest(name, known)}", f"{at}.{name}", code="unknown_parameter")


def _content(content: Any, role: str, at: str, found: Found, part: Any) -> Any:
    if content is None and role == "assistant":
        return ""
    if isinstance(content, str):
        found.characters += len(content)
        return content
    if not isinstance(content, list):
        raise Refusal(f"{at} is a text or a list of parts, not {shown(content)}", at)
    parts = [part(one, role, f"{at}.{index}", found) for index, one in enumerate(content)]
    return [one for one in parts if one is not None]


def _part(part: Any, role: str, at: str, found: Found) -> dict[str, Any]:
    if isinstance(part, str):
        part = {"type": "text", "text": part}
    if not isinstance(part, dict):
        raise Refusal(f"{at} is an object with a type, not {shown(part)}", at)
    kind = part.get("type") or next((name for name in ("text", *MEDIA) if name in part), None)
    if kind in TEXTS or kind == "refusal":
        field = "refusal" if kind == "refusal" else "text"
        _require_known(part, {"type", field}, at)
        return _text(part.get(field), f"{at}.{field}", found)
    if not isinstance(kind, str) or kind not in MEDIA:
        said = "there is no audio in this model's world: " if isinstance(kind, str) and "audio" in kind else ""
        raise Refusal(f"{at}.type: {said}parts are text, image_url and video_url, not {shown(kind)}", f"{at}.type")
    name = next((name for name in (kind, MEDIA[kind]) if name in part), kind)
    _require_known(part, {"type", name, "detail"}, at)
    source = part.get(name)
    if isinstance(source, dict):
        _require_known(source, {"url", "detail"}, f"{at}.{name}")
        source = source.get("url")
    return _medium(MEDIA[kind], source, role, f"{at}.{name}", found)


def _block(block: Any, role: str, at: str, found: Found) -> dict[str, Any] | None:
    if not isinstance(block, dict):
        raise Refusal(f"{at} is an object with a type, not {shown(block)}", at)
    kind = block.get("type")
    if kind in ("thinking", "redacted_thinking") and role == "assistant":
        return None
    if kind == "text":
        _require_known(block, {"type", "text", "citations"}, at)
        return _text(block.get("text"), f"{at}.text", found)
    if kind != "image":
        raise Refusal(f"{at}.type: blocks are text and image, not {shown(kind)}", f"{at}.type")
    _require_known(block, {"type", "source"}, at)
    source, at = block.get("source"), f"{at}.source"
    if isinstance(source, dict) and source.get("type") == "base64":
        _require_known(source, {"type", "media_type", "data"}, at)
        medium, data = source.get("media_type"), source.get("data")
        if medium not in ("image/jpeg", "image/png", "image/gif", "image/webp") or not isinstance(data, str):
            raise Refusal(f"{at} has a media_type of pictures and base64 data", at)
        address: Any = f"data:{medium};base64,{data}"
    elif isinstance(source, dict) and source.get("type") == "url":
        _require_known(source, {"type", "url"}, at)
        address = source.get("url")
    else:
        raise Refusal(f"{at} is of type base64 or url", at)
    _medium("image_url", address, role, at, found)
    return {"type": "image", "source": {"type": "url", "url": address}}


def _text(text: Any, at: str, found: Found) -> dict[str, Any]:
    if not isinstance(text, str):
        raise Refusal(f"{at} is a text, not {shown(text)}", at)
    found.characters += len(text)
    return {"type": "text", "text": text}


def _medium(kind: str, address: Any, role: str, at: str, found: Found) -> dict[str, Any]:
    if not isinstance(address, str) or not address:
        raise Refusal(f"{at} is the medium's address, as a text or as {{'url': ...}}, not {shown(address)}", at)
    if role != "user":
        raise Refusal(f"{at}: pictures and clips belong into messages of the user, not of role {role}", at)
    found.media += max(1, address.count(",")) if kind == "video_url" and address[:5].lower() == "data:" else 1
    return {"type": kind, kind: {"url": address}}
