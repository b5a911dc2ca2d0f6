"""Where an API server is, what leads there, and the token that opens it, as people give them: copied, in files."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, urlsplit

from nvila.components.contracts.environment import Environment, name_of, revealed
from nvila.components.contracts.errors import ConfigError

TOKEN_VARIABLE = name_of("pipelines_token")
PROXY = "NO_PROXY"


@dataclass(frozen=True)
class Proxy:
    """What stands between here and there."""

    url: str
    """Without its login."""
    login: str = ""
    """`name:password`, where it asks for one."""


def api_url(host: str) -> str:
    """The URL without a slash at its end, and without what stands behind a # in a browser.

    Raises:
        ConfigError: it is no URL, or holds a password.
    """
    try:
        parts = urlsplit(host)
        usable = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0 and not re.search(r"\s", host)
    except ValueError:
        usable = False
    if not usable:
        raise ConfigError("not a URL", where="--host", do="It begins with https:// or http://.", value=_shown(host))
    if "@" in parts.netloc or parts.query:
        raise ConfigError(
            "a URL of the API has no name, password or question mark",
            where="--host",
            value=_shown(host),
            do=f"It is like https://kubeflow.example/pipeline; tokens come with --token-file or {TOKEN_VARIABLE}.",
        )
    return f"{parts.scheme}://{parts.netloc}{parts.path}".rstrip("/")


def proxy_for(url: str) -> Proxy | None:
    """The proxy that HTTP_PROXY, HTTPS_PROXY or ALL_PROXY name for this URL; None where NO_PROXY leaves its host out.

    KFP's client looks at none of them. Small letters count as well, and NO_PROXY may hold networks (10.0.0.0/8), as
    for MLflow and downloads.

    Raises:
        ConfigError: it is no URL of a proxy that speaks HTTP.
    """
    from requests.utils import get_environ_proxies, select_proxy

    given = select_proxy(url, get_environ_proxies(url))
    if not given:
        return None
    try:
        parts = urlsplit(given if "://" in given else f"//{given}", scheme="http")
        usable = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:
        usable = False
    if not usable:
        variable = f"{urlsplit(url).scheme.upper()}_PROXY"
        raise ConfigError(
            "not a URL of an HTTP proxy", where=variable, value=_shown(given), do="Like http://host:3128."
        )
    login = f"{unquote(parts.username)}:{unquote(parts.password or '')}" if parts.username else ""
    return Proxy(f"{parts.scheme}://{_shown(parts.netloc)}", login)


def token_of(file: Path | None, here: Environment) -> str:
    """The bearer token from the file, else from the environment; empty without either.

    Raises:
        ConfigError: the file cannot be read, or what is given is no token.
    """
    if file:
        return _token_in(file, "--token-file")
    if token := revealed(here.pipelines_token):
        return _one_word(token, TOKEN_VARIABLE)
    renewed = here.pipelines_token_file
    return _token_in(renewed, name_of("pipelines_token_file")) if renewed else ""


def readable(path: Path, option: str) -> str:
    """Text of the file that an option names.

    Raises:
        ConfigError: it cannot be read.
    """
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot be read: {error.strerror}", where=option, value=str(path)) from None
    except UnicodeDecodeError:
        raise ConfigError("is no text", where=option, value=str(path)) from None


def _shown(url: str) -> str:
    """Without a password."""
    return url.rpartition("@")[2]


def _token_in(path: Path, option: str) -> str:
    return _one_word(readable(path, option), option)


def _one_word(text: str, where: str) -> str:
    """The token, without the line break that editors leave behind it."""
    token = text.strip()
    if len(token.split()) != 1 or not token.isascii():
        raise ConfigError("holds no token", where=where)
    return token
