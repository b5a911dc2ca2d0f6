"""Takes secrets out of what is about to be shown: settings by their key, text by what looks like a credential.

Used before anything goes to MLflow, a webhook, the report, the log or the terminal. Where it comes from is left to
others; what tokens look like is in `tokens`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from itertools import pairwise
from typing import Any
from urllib.parse import quote

from nvila.components.contracts.environment import values_where
from nvila.components.contracts.text import visible_lines
from nvila.components.tracking.tokens import hide_tokens

HIDDEN = "[redacted]"
_WORDS = {"password", "passwords", "passwd", "passphrase", "pwd", "secret", "secrets", "credential", "credentials",
          "authorization", "dsn", "cookie", "cookies", "bearer", "jwt"}  # fmt: skip
_ENDINGS = ("password", "passwd", "passphrase", "token", "secret", "apikey", "accesskey", "secretkey", "privatekey",
            "accountkey", "authkey")  # fmt: skip
"""Of words that are written together: `PGPASSWORD`, `authtoken`."""
_KEYS = {"api", "access", "private", "signing", "encryption", "account", "secret", "shared", "storage", "master",
         "auth",
         "ssh", "subscription", "service", "session", "deploy"}  # fmt: skip
"""Words that make a secret of a following `key`."""
_PAIRS = {("connection", "string"), ("access", "signature"), ("webhook", "url"), ("sas", "url"),
          *((of, "pass") for of in ("db", "user", "smtp", "mail", "email", "ftp", "proxy", "admin",
          "root"))}  # fmt: skip
_NOT_OURS = {"image", "video", "media", "audio", "vision", "visual", "text", "time", "chat", "bos", "eos", "pad", "unk",
             "sep", "cls", "mask", "special", "stop", "start", "end", "begin", "soft", "new", "next", "last", "first",
             "added", "extra", "newline", "prompt", "vocab", "per", "of", "num", "max", "min", "length", "expected",
             "unexpected", "predicted", "generated", "input", "output", "previous", "current"}  # fmt: skip
"""Before `token`: a language model's."""
_ABOUT = {"id", "ids", "type", "types", "count", "counts", "budget", "limit", "length", "index", "position",
          "positions",
          "embedding", "embeddings", "rate", "size", "level"}  # fmt: skip
"""Behind `token`: a language model's."""
_SHOWN = {"", "none", "null", "true", "false", HIDDEN}

_WORD_BREAK = re.compile(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])|[^A-Za-z0-9]+")
_USERINFO = re.compile(
    r"(?P<scheme>\b(?!hf:)[A-Za-z][A-Za-z0-9+.-]{0,30}://)"
    r"(?:[^\s/?#\"'<>]{0,999}|(?!\[)[^\s/?#:@\"'<>]{0,99}:(?!\d+[/?#])[^\s\"'<>]{0,999})@(?!sha256:)"
)
"""`user:password@` of a URL. Not `hf://id@revision`, nor an image's digest, where the sign means something else."""
_QUERY = re.compile(r"(?P<name>[?&#;](?P<key>[\w.-]+)=)(?P<value>[^&\s#\"'<>]+)")
_QUERY_KEYS = {"sig", "signature", "key", "auth", "pass", "hmac", "code", "awsaccesskeyid"}
_HEADER = re.compile(
    r"(?P<name>\b(?:Proxy-)?Authorization\\?[\"']?\s*[:=]\s*\\?[\"']?"
    r"(?:(?:Bearer|Basic|Token|ApiKey|Digest|Negotiate|AWS4-HMAC-SHA256)\s+|[A-Za-z][\w-]{0,30} +(?=[^\s\"'\\]{8}))?)"
    r"(?P<value>[^\s\"'\\]+)",
    re.IGNORECASE,
)
_BEARER = re.compile(r"(?P<name>\b(?i:Bearer|Basic)\s+)(?=\S*[0-9=_]|\S+[A-Z]|\S{20})(?P<value>[A-Za-z0-9._~+/=-]{6,})")
"""With a digit or a capital in it, or long: `basic settings` are none."""
_COOKIE = re.compile(r"(?P<name>\b(?:Set-)?Cookie\\?[\"']?\s*[:=]\s*\\?[\"']?)(?P<value>[^\r\n\"'\\]+)", re.IGNORECASE)
_LOGIN = re.compile(r"(?P<name>\blogin\s+\S+\s+password\s+)(?P<value>\S+)")
"""A line of `.netrc`."""
_NEXT_LINE = r"[ \t]*(?:[|>][-+\d]?[ \t]*)?\n[ \t]+(?:- +)?(?=[^\s:]{6,}[ \t]*(?:\n|\Z))"
"""The value stands by itself on the next line, as YAML allows."""
_OPEN = r"b?(?P<open>\\*[\"'])"
_NAMED = re.compile(
    r"(?<![\w.-])(?P<key>[\w.-]+)(?:\\*[\"'])?[ \t]*"
    rf"(?::{_NEXT_LINE}|(?:=>|:=|[=:]|%3[AaDd])[ \t]*(?P<list>\[(?!redacted\])[ \t]*)?(?:{_OPEN})?)"
)
_OPTION = re.compile(rf"(?<![\w-])--(?P<key>[\w-]+)[ \t]+(?=[^\s-])(?:{_OPEN})?")
_VARIABLE = re.compile(
    r"\b(?:name|key)\\*[\"']?[ \t]*[:=][ \t]*\\*[\"']?(?P<key>[\w.-]+)\\*[\"']?(?:,\s*|\n\s*)\\*[\"']?value\\*[\"']?"
    rf"[ \t]*[:=][ \t]*(?:{_OPEN})?"
)
"""Of a pod: `name: HF_TOKEN, value: ...`."""
_HEADER_PAIR = re.compile(rf"[(\[][ \t]*b?\\*[\"'](?P<key>[\w.-]+)\\*[\"'],[ \t]*{_OPEN}(?=[^\s\"']*\d)")
"""`("x-api-key", "...")`; two words of a list have no digit."""
_ELEMENT = re.compile(r"<(?P<key>[\w.-]+)>(?P<value>[^<>\s]{3,})(?=</)")
_SPOKEN = re.compile(
    r"(?P<name>\b(?i:password|passwd|passphrase|secret|token|api[ _-]?key)\s+(?:is\s+|was\s+)?[\"'`]?)"
    r"(?P<value>(?=\S*\d)(?=\S*[a-z])(?=\S*[A-Z])[^\s\"'`]{12,})"
)
_USER_OPTION = re.compile(
    r"(?P<name>(?<!\S)(?:-u|--user|--proxy-user)[ =]?[\"']?[^\s:\"'/]{1,99}:)(?!\d+(?:\s|$))(?P<value>[^\s\"']{3,})"
)
"""Of curl."""
_VALUE = re.compile(
    r"(?<=\")(?:[^\"\\]|\\.)+|(?<=')(?:[^'\\]|\\.)+"
    r"|(?:[^\s\"',;&\\]|[,;&](?![\s\"']|$|[\w.-]{1,99}[\"']?\s*[=:])|\\(?![\"'nrt])){3,}"
)
"""Up to the quote that ends it. A comma belongs to a value without quotes unless something new begins behind it."""
_COLOUR = re.compile(r"\x1b\[[0-?]*[ -/]*[@-~]")
_NUMBER = re.compile(r"[\d.,]+")
_SHORTEST = 8
"""Values of secret environment variables shorter than this are too common to search for."""


def is_secret(key: str, value: Any = "") -> bool:
    """Whether the last part of a dotted key names a secret (`api_key`, `hf_token`; not `max_new_tokens: 8`)."""
    if isinstance(value, bool):
        return False
    parts = [part for part in re.split(r"[./]", key) if part and not part.isdigit() and part != "value"]
    words = [word.lower() for word in _WORD_BREAK.split(parts[-1] if parts else "") if word]
    if _WORDS & set(words) or any(word != "token" and word.endswith(_ENDINGS) for word in words):
        return True
    for before, word, behind in zip(["", *words], words, [*words[1:], ""], strict=False):
        if word == "token" and before not in _NOT_OURS and behind not in _ABOUT:
            return True
        if word == "tokens" and before not in _NOT_OURS and isinstance(value, str) and not _NUMBER.fullmatch(value):
            return bool(value)
    return any(pair in _PAIRS or (pair[0] in _KEYS and pair[1] in ("key", "keys")) for pair in pairwise(words))


def redact(value: Any, key: str = "") -> Any:
    """`value` (any JSON) with secrets replaced, at any depth; also in the form `{"name": "HF_TOKEN", "value": ...}`."""
    if isinstance(value, Mapping):
        if key and is_secret(key, "") and value:
            return HIDDEN
        named = value.get("name", value.get("key")) if "value" in value else None
        return {
            redact_text(name) if isinstance(name, str) else name: redact(
                item, named if name == "value" and isinstance(named, str) else str(name)
            )
            for name, item in value.items()
        }
    if value is not None and value != "" and is_secret(key, value):
        return HIDDEN
    if isinstance(value, (list, tuple)):
        return [redact(item, key) for item in value]
    return redact_text(value) if isinstance(value, str) else value


def redact_text(text: str) -> str:
    """`text` without tokens, private keys, passwords of URLs, `password=...`, and secrets of the environment.

    Where a terminal's colours stand inside a secret they are left out with it.
    """
    shown = _redacted(text)
    if "\x1b" not in text:
        return shown
    plain = _redacted(_COLOUR.sub("", text))
    return shown if _COLOUR.sub("", shown) == plain else plain


def _redacted(text: str) -> str:
    for secret in _secrets_of_environment():
        text = text.replace(secret, HIDDEN)
    text = hide_tokens(text, HIDDEN)
    text = _USERINFO.sub(rf"\g<scheme>{HIDDEN}@", text)
    text = _QUERY.sub(_hide_parameter, text)
    for pattern in (_HEADER, _BEARER, _COOKIE, _LOGIN, _SPOKEN, _USER_OPTION):
        text = pattern.sub(rf"\g<name>{HIDDEN}", text)
    for pattern in (_NAMED, _OPTION, _VARIABLE, _HEADER_PAIR):
        text = _hide_assigned(text, pattern)
    return _ELEMENT.sub(lambda found: f"<{found['key']}>{HIDDEN}" if is_secret(found["key"]) else found[0], text)


def tell(text: str) -> str:
    """`text` as a log or a terminal may have it: without secrets, and with nothing in it that steers a terminal."""
    return visible_lines(redact_text(text))


def _secrets_of_environment() -> list[str]:
    """As they are and as a URL has them; the longest first, as one may hold another."""
    secret = values_where(lambda name: name not in ("PWD", "OLDPWD") and is_secret(name))
    found = {value for value in secret if len(value) >= _SHORTEST}
    return sorted(found | {quote(value, safe="") for value in found}, key=len, reverse=True)


def _hide_parameter(found: re.Match[str]) -> str:
    key = found["key"].lower()
    signed = key in _QUERY_KEYS and len(found["value"]) >= _SHORTEST
    return f"{found['name']}{HIDDEN}" if signed or key.endswith("signature") or is_secret(key) else found[0]


def _hide_assigned(text: str, names: re.Pattern[str]) -> str:
    """Without the values of secret names. What is behind another name is looked at by itself: `failed: token=...`."""
    parts, at = list[str](), 0
    while named := names.search(text, at):
        parts.append(text[at : (at := named.end())])
        key, found = named["key"], named.groupdict()
        if not (is_secret(key, "?") or key.lower().endswith("signature") or key.lower() == "auth"):
            continue
        if (end := _end_of_value(text, at, found["open"] or "")) > at and _is_assigned(key, text[at:end]):
            parts.append(HIDDEN)
            at = max(end, text.find("]", end, _end_of_line(text, end))) if found.get("list") else end
    return "".join([*parts, text[at:]])


def _end_of_value(text: str, at: int, opened: str) -> int:
    """Where the value that begins at `at` ends; a quote with backslashes is ended by one with as many."""
    if not opened.startswith("\\"):
        value = _VALUE.match(text, at)
        return value.end() if value else at
    line = _end_of_line(text, at)
    closed = re.compile(rf"(?<!\\){re.escape(opened)}").search(text, at, line)
    return closed.start() if closed else line


def _end_of_line(text: str, at: int) -> int:
    return end if (end := text.find("\n", at)) >= 0 else len(text)


def _is_assigned(key: str, value: str) -> bool:
    name = key.lower()
    if value.lower() in _SHOWN or value.startswith(HIDDEN) or name.endswith(("authorization", "cookie")):
        return False
    if "token" in name and (_NUMBER.fullmatch(value) or (name.endswith("tokens") and len(value) < 2 * _SHORTEST)):
        return False  # a language model's
    if name == "auth":  # of Docker's registries
        return bool(re.fullmatch(r"(?=.*[0-9A-Z])[A-Za-z0-9+/]{12,}={0,2}", value))
    if name.endswith("signature") and re.fullmatch(r"[\w%+/=-]{16,}", value):
        return True
    return is_secret(key, value)
