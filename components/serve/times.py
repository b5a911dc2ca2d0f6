"""Times in answers about a clip: the model says `<t3>`, whoever asked is told `<1.5>`."""

from __future__ import annotations

import json
from typing import Any

from nvila.components.model.text.timetokens import Times


class Told:
    """Rewrites the texts of one answer, whole or in events; what may be the beginning of a token is held back."""

    def __init__(self, times: Times) -> None:
        self._times = times
        self._held: dict[int, str] = {}

    def whole(self, body: bytes) -> bytes:
        """A whole answer of `/v1/chat/completions` or `/v1/messages`."""
        content = json.loads(body)
        for _, part, key in _texts(content, "message"):
            part[key] = self._times.said(part[key])
        return json.dumps(content).encode()

    def events(self, body: bytes) -> bytes:
        """Events of a streamed answer, as many as a message has."""
        return b"".join(self._event(event) for event in body.split(b"\n\n") if event)

    def _event(self, event: bytes) -> bytes:
        head, data, said = event.rpartition(b"data: ")
        try:
            content = json.loads(said) if data else None
        except ValueError:
            content = None
        if not isinstance(content, dict):
            return event + b"\n\n"
        before = b""
        if content.get("type") == "content_block_stop" and (rest := self._held.pop(content["index"], "")):
            delta = {"type": "text_delta", "text": self._times.said(rest)}
            said = json.dumps({"type": "content_block_delta", "index": content["index"], "delta": delta}).encode()
            before = b"event: content_block_delta\ndata: " + said + b"\n\n"
        ended = {choice["index"] for choice in content.get("choices") or () if choice.get("finish_reason")}
        for choice in content.get("choices") or ():
            if choice["index"] in ended and self._held.get(choice["index"]):
                choice["delta"]["content"] = choice["delta"].get("content") or ""
        for index, part, key in _texts(content, "delta"):
            text = self._held.pop(index, "") + part[key]
            shown = text if index in ended else self._times.open(text)
            if rest := text[len(shown) :]:
                self._held[index] = rest
            part[key] = self._times.said(shown)
        return before + head + b"data: " + json.dumps(content).encode() + b"\n\n"


def _texts(content: dict[str, Any], where: str) -> list[tuple[int, dict[str, Any], str]]:
    """Texts of an answer in OpenAI's form and in Anthropic's: of which choice or block, what holds it, by which key."""
    found = [(choice["index"], choice.get(where), "content") for choice in content.get("choices") or ()]
    parts = [content["delta"]] if isinstance(content.get("delta"), dict) else content.get("content") or []
    found += [(content.get("index", at), part, "text") for at, part in enumerate(parts)]
    return [(at, part, key) for at, part, key in found if isinstance(part, dict) and isinstance(part.get(key), str)]
