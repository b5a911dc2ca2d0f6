"""How the endpoint says no: one exception, and the two forms of error bodies that clients know."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Mapping
from typing import Any

ANTHROPIC = "/v1/messages"
"""Beginning of the paths that speak Anthropic's protocol; the others speak OpenAI's."""

_OPENAI = {401: "authentication_error", 408: "timeout_error", 429: "rate_limit_error"}
_ANTHROPIC = {401: "authentication_error", 404: "not_found_error", 413: "request_too_large", 429: "rate_limit_error"}
_AGAIN = {429: "1", 503: "5"}
"""Seconds after which a client may come again."""


class Refusal(Exception):
    """A request that is not answered.

    Args:
        message: what is wrong, why, and what to do.
        param: the field, dotted.
        status: HTTP status.
        code: short name of the reason for programs.
        headers: of the answer, beside those of its body.
    """

    def __init__(
        self,
        message: str,
        param: str | None = None,
        *,
        status: int = 400,
        code: str = "invalid_value",
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.message, self.param, self.status, self.code = message, param, status, code
        self.headers = dict(headers or {}) | ({"retry-after": _AGAIN[status]} if status in _AGAIN else {})

    def body(self, path: str) -> bytes:
        """The error as the protocol of that path has it."""
        return error_body(path, self.status, self.message, self.param, self.code)


def error_body(path: str, status: int, message: str, param: str | None = None, code: Any = None) -> bytes:
    """JSON of an error: `{"error": {"message", "type", "param", "code"}}`, or Anthropic's form on its paths."""
    said: dict[str, Any]
    if path.startswith(ANTHROPIC):
        kind = _ANTHROPIC.get(status, "invalid_request_error" if status < 500 else "api_error")
        said = {"type": "error", "error": {"type": kind if status != 503 else "overloaded_error", "message": message}}
    else:
        kind = _OPENAI.get(status, "invalid_request_error" if status < 500 else "server_error")
        said = {"error": {"message": message, "type": kind, "param": param, "code": code}}
    return json.dumps(said).encode()


def nearest(name: str, known: Iterable[str]) -> str:
    """ "; did you mean ..." where a known name is near, else nothing."""
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f"; did you mean {near[0]!r}?" if near else ""


def shown(value: Any) -> str:
    """A value of a request as a message shows it: short."""
    try:
        text = json.dumps(value, ensure_ascii=True)
    except (TypeError, ValueError, RecursionError):
        text = repr(type(value).__name__)
    return text if len(text) <= 80 else text[:77] + "..."
