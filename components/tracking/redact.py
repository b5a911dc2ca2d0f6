"""Takes secrets out of what is about to be shown: settings by their key, text by what looks like a credential.

Used before anything goes to MLflow or into the report. Where the settings come from is left to others.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

HIDDEN = "[redacted]"
_WORDS = {
    "token",
    "password",
    "passwd",
    "passphrase",
    "secret",
    "secrets",
    "credential",
    "credentials",
    "authorization",
}
_KEYS = {"api", "access", "private", "signing", "encryption", "account"}
"""Words that make a secret of a following `key`."""
_NAMES = r"[\w-]*(?:token(?!s)|password|passwd|secret|api[_-]?key|access[_-]?key|credential)[\w-]*"
_USERINFO = re.compile(r"(?P<scheme>\b(?!hf:)[A-Za-z][A-Za-z0-9+.-]*://)[^\s/?#]*@")
"""`user:password@` of a URL. Not `hf://id@revision`, where the sign means something else."""
_QUERY = re.compile(rf"(?P<name>[?&](?:{_NAMES}|[\w-]*signature)=)[^&\s#]+", re.IGNORECASE)
_ASSIGNED = re.compile(rf"(?P<name>\b{_NAMES}[\"']?\s*[=:]\s*)(?P<quote>[\"']?)[^\s\"',;&]{{3,}}", re.IGNORECASE)
_BEARER = re.compile(r"(?P<name>\b(?:Bearer|Basic)\s+)[A-Za-z0-9._~+/=-]{6,}", re.IGNORECASE)
_SHORTEST = 8
"""Values of secret environment variables shorter than this are too common to search for."""


def is_secret(key: str, value: Any = "") -> bool:
    """Whether the last part of a dotted key names a secret (`api_key`, `hf_token`; not `max_new_tokens: 8`)."""
    last = re.split(r"[./]", key)[-1]
    words = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", last).lower().replace("-", "_").split("_")
    if _WORDS & set(words) or "apikey" in words:
        return True
    if "tokens" in words and isinstance(value, str) and value:
        return True
    return any(second in ("key", "keys") and first in _KEYS for first, second in pairwise(words))


def redact(value: Any, key: str = "") -> Any:
    """`value` (any JSON) with secrets replaced, at any depth."""
    if isinstance(value, Mapping):
        if key and is_secret(key, "") and value:
            return HIDDEN
        return {name: redact(item, str(name)) for name, item in value.items()}
    if value is not None and value != "" and is_secret(key, value):
        return HIDDEN
    if isinstance(value, (list, tuple)):
        return [redact(item, key) for item in value]
    return redact_text(value) if isinstance(value, str) else value


def redact_text(text: str) -> str:
    """`text` without user names and passwords of URLs, `password=...`, bearer tokens and secrets of the environment."""
    for name, secret in os.environ.items():
        if len(secret) >= _SHORTEST and is_secret(name):
            text = text.replace(secret, HIDDEN)
    text = _USERINFO.sub(rf"\g<scheme>{HIDDEN}@", text)
    text = _QUERY.sub(rf"\g<name>{HIDDEN}", text)
    text = _BEARER.sub(rf"\g<name>{HIDDEN}", text)
    return _ASSIGNED.sub(rf"\g<name>\g<quote>{HIDDEN}", text)
