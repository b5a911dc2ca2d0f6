"""Tells a webhook how a run ended, in the form of Standard Webhooks: signed, with id and time, tried a few times."""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import json
import re
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Mapping
from datetime import UTC, datetime
from http.client import HTTPException
from typing import Any
from urllib.parse import urlsplit

from nvila.components.contracts.environment import name_of
from nvila.components.contracts.errors import ConfigError, NvilaError

URL = name_of("webhook_url")
TIMEOUT_SECONDS = 10.0
PAUSES_SECONDS = (1.0, 5.0)
"""Between the attempts, so there is one attempt more than these."""
_INSIDE = re.compile(r"localhost|127\.0\.0\.1|[a-z][a-z0-9-]*|([a-z0-9-]+\.)+svc(\.cluster\.local)?")
"""Host names that do not leave the cluster: only there may the message travel in the clear. A number is an address."""


def post(url: str, kind: str, data: Mapping[str, Any], secret: str) -> None:
    """Send `data` as an event of this kind.

    Every attempt carries the same id, so that a receiver can drop a repetition. The path of the URL is often a secret
    itself, so no message shows more than the host.

    Raises:
        ConfigError: the URL may not be used, or the secret cannot be read.
        NvilaError: the receiver did not take it.
    """
    host = _host(url)
    now = datetime.now(UTC)
    event = {"type": kind, "timestamp": now.isoformat(timespec="seconds"), "data": dict(data)}
    body = json.dumps(event, separators=(",", ":")).encode()
    headers = {"Content-Type": "application/json", "User-Agent": "nvila"}
    headers |= _signed(f"msg_{uuid.uuid4().hex}", str(int(now.timestamp())), body, secret)
    opener = urllib.request.build_opener(_NoRedirect)
    for pause in (*PAUSES_SECONDS, None):
        request = urllib.request.Request(url, data=body, headers=headers, method="POST")
        try:
            with opener.open(request, timeout=TIMEOUT_SECONDS):
                return
        except urllib.error.HTTPError as error:
            problem = f"HTTP {error.code}"
            if error.code < 500 and error.code not in (408, 429):
                break
        except OSError as error:
            problem = str(getattr(error, "reason", error))
        except HTTPException as error:  # whose text may be the URL
            problem = type(error).__name__
        if pause is not None:
            time.sleep(pause)
    raise NvilaError(f"the webhook did not take the message: {problem}", where=host)


def sign(identity: str, timestamp: str, body: bytes, secret: str) -> str:
    """`v1,` and the base64 of HMAC-SHA256 over `id.timestamp.body`.

    Args:
        secret: `whsec_` with base64 behind it, as Standard Webhooks writes it, or any other text.
    """
    try:
        key = base64.b64decode(secret[6:], validate=True) if secret.startswith("whsec_") else secret.encode()
    except binascii.Error as error:
        raise ConfigError("what follows whsec_ is not base64", where=name_of("webhook_secret")) from error
    digest = hmac.new(key, f"{identity}.{timestamp}.".encode() + body, hashlib.sha256).digest()
    return f"v1,{base64.b64encode(digest).decode()}"


def _signed(identity: str, timestamp: str, body: bytes, secret: str) -> dict[str, str]:
    """The three headers; without a secret there is no signature, and the URL alone protects the receiver."""
    headers = {"webhook-id": identity, "webhook-timestamp": timestamp}
    return headers | ({"webhook-signature": sign(identity, timestamp, body, secret)} if secret else {})


def _host(url: str) -> str:
    """The URL's host, if the URL may be used."""
    parts = urlsplit(url)
    host = (parts.hostname or "").lower()
    if parts.username or not host or parts.scheme not in ("http", "https"):
        raise ConfigError("not a plain http(s) URL", where=URL, value=host)
    if parts.scheme == "http" and not _INSIDE.fullmatch(host):
        raise ConfigError("http leaves the cluster unencrypted", where=URL, value=host, do="Use https.")
    return host


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A receiver that sends us elsewhere is not the one that was named."""

    def redirect_request(self, *arguments: Any) -> None:
        """Treat the redirection as the error it is here."""
        return
