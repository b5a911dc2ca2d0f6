"""Fetches pictures and clips from the hosts that the operator lists, and from nowhere else.

One parser (yarl) reads an address, and its very result is both judged and fetched. A name is resolved once; every
address that it has must be public, and these addresses are connected to: a name cannot change between check and use.
Proxies of the environment are not used, cookies not kept, and no credentials sent.
"""

from __future__ import annotations

import asyncio
import ipaddress
import re
import socket
import ssl
from collections.abc import Awaitable, Callable, Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import aiohttp
    from yarl import URL

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Resolve = Callable[[str, int], Awaitable[list[tuple[str, int]]]]
"""From a name and a port to addresses with ports."""

MOST_REDIRECTS = 3
MOST_CHARACTERS = 8192
"""Of an address."""
CONNECT_SECONDS = 5.0
CHUNK_BYTES = 2**18
PORTS = {"http": 80, "https": 443}
INNER = [
    ipaddress.ip_network(text)
    for text in (
        *("0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16", "172.16.0.0/12"),
        *("192.0.0.0/24", "192.0.2.0/24", "192.88.99.0/24", "192.168.0.0/16", "198.18.0.0/15", "198.51.100.0/24"),
        *("203.0.113.0/24", "224.0.0.0/4", "240.0.0.0/4", "168.63.129.16/32"),
        *("2001::/23", "2001:db8::/32", "2002::/16", "3fff::/20"),
    )
]
"""Addresses of no public machine (IANA's special-purpose registries): private, shared, loopback, link-local,
documentation, benchmarks, multicast, reserved; 6to4, its relays and Teredo, which lead on to any other address; and the
one public address behind which Azure answers its own machines."""
GLOBAL_UNICAST = ipaddress.ip_network("2000::/3")
"""Of IPv6 nothing else is public: mapped and translated (64:ff9b::/96, 64:ff9b:1::/48) addresses lie outside."""


def is_public(address: Address) -> bool:
    """Whether anybody's machine may have the address. `ipaddress.is_global` says so of translated ones as well."""
    if address.version == 6 and address not in GLOBAL_UNICAST:
        return False
    return not any(address in network for network in INNER)


async def resolve(host: str, port: int) -> list[tuple[str, int]]:
    """What the system's resolver says."""
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return [(str(info[4][0]), port) for info in found]


@dataclass(frozen=True)
class Remote:
    """What may be fetched, and how."""

    domains: Collection[str]
    """Host names in lower case, each as it stands: no name below it, and no other spelling."""
    max_bytes: int
    seconds: float = 20.0
    """For all of it, redirects included."""
    resolve: Resolve = resolve
    allows: Callable[[Address], bool] = is_public
    """Tests have a server on this machine; there is no setting for it."""
    tls: ssl.SSLContext | None = None
    """None trusts the authorities of the system."""

    async def fetch(self, text: str, take: Callable[[int], None] = lambda _: None) -> bytes:
        """The content behind an http(s) address, at most three redirects on; each is judged from the start.

        Args:
            text: the address.
            take: told the bytes of each piece as it comes; what it raises ends the fetching.

        Raises:
            ValueError: it may not be fetched, does not answer in time, answers with an error, or is too large.
        """
        import aiohttp

        if not self.domains:
            raise ValueError("remote media URLs are switched off on this server; send the bytes as a data: URL")
        url = self.judge(text)
        try:
            async with asyncio.timeout(self.seconds), self._session() as session:
                for _ in range(MOST_REDIRECTS + 1):
                    async with session.get(url, allow_redirects=False) as response:
                        if response.status not in (301, 302, 303, 307, 308):
                            return await self._content(response, take)
                        url = self.judge(response.headers.get("Location", ""), url)
                raise ValueError(f"{url.raw_host} redirects more than {MOST_REDIRECTS} times")
        except TimeoutError as error:
            raise ValueError(f"{url.raw_host} did not answer within {self.seconds:g} seconds") from error
        except (aiohttp.ClientError, OSError) as error:
            if isinstance(cause := error.__cause__, _RefusedError):
                raise ValueError(str(cause)) from error
            raise ValueError(f"{url.raw_host} cannot be fetched from: {type(error).__name__}") from error

    def judge(self, text: str, base: URL | None = None) -> URL:
        """The address as it will be fetched; one without a host is relative to `base`.

        Raises:
            ValueError: it is not one of a listed host at its scheme's own port.
        """
        from yarl import URL

        if len(text) > MOST_CHARACTERS:
            raise ValueError(f"a media URL may have at most {MOST_CHARACTERS} characters")
        if re.search(r"[\x00-\x20\x7f-\x9f\\]", text):
            raise ValueError("a media URL holds a space, a backslash or a control character")
        named = re.match(r"(?:[A-Za-z][A-Za-z0-9+.-]*:)?//([^/?#]*)", text)
        if named is None and base is None:
            raise ValueError("a remote media URL must read https://<host>/<path>")
        if named and not named[1].isascii():
            raise ValueError("the host of a media URL must be in ASCII (international names as xn--...)")
        if named and "@" in named[1]:
            raise ValueError("a media URL with a user or a password is not fetched")
        try:
            url = URL(text) if base is None else base.join(URL(text))
            host, port = url.raw_host, url.port
        except ValueError as error:
            raise ValueError("not a media URL that can be read") from error
        if url.scheme not in PORTS or not host:
            raise ValueError("a remote media URL must read https://<host>/<path>")
        if "@" in url.raw_authority:
            raise ValueError("a media URL with a user or a password is not fetched")
        if host not in self.domains:
            raise ValueError(f"{host} is not one of the hosts that this server fetches media from")
        if port != PORTS[url.scheme]:
            raise ValueError(f"media are fetched at port {PORTS[url.scheme]} for {url.scheme}, not at {port}")
        return url

    def _session(self) -> aiohttp.ClientSession:
        import aiohttp

        return aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(
                resolver=_judging(self), use_dns_cache=False, ssl=self.tls or True, force_close=True
            ),
            cookie_jar=aiohttp.DummyCookieJar(),
            headers={"Accept": "*/*", "Accept-Encoding": "identity", "User-Agent": "nvila"},
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_SECONDS),
            trust_env=False,
            auto_decompress=False,
        )

    async def _content(self, response: aiohttp.ClientResponse, take: Callable[[int], None]) -> bytes:
        host = response.url.raw_host
        if response.status != 200:
            raise ValueError(f"{host} answered {response.status}")
        if response.headers.get("Content-Encoding", "identity").lower() != "identity":
            raise ValueError(f"{host} sent compressed content, which was not asked for")
        content = bytearray()
        if (response.content_length or 0) <= self.max_bytes:
            async for chunk in response.content.iter_chunked(CHUNK_BYTES):
                take(len(chunk))
                content += chunk
                if len(content) > self.max_bytes:
                    break
            else:
                return bytes(content)
        raise ValueError(f"more than {self.max_bytes} bytes at {host}")


class _RefusedError(OSError):
    """A name of which some address is not public."""


def _judging(remote: Remote) -> aiohttp.abc.AbstractResolver:
    from aiohttp.abc import AbstractResolver, ResolveResult

    class Judging(AbstractResolver):
        async def resolve(
            self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_UNSPEC
        ) -> list[ResolveResult]:
            """Addresses to connect to, none of them if any is not allowed."""
            found = await remote.resolve(host, port)
            if not found or not all(remote.allows(ipaddress.ip_address(address)) for address, _ in found):
                raise _RefusedError(f"{host} has an address that is not public, or none")
            return [
                ResolveResult(
                    hostname=host,
                    host=address,
                    port=at,
                    family=socket.AF_INET6 if ":" in address else socket.AF_INET,
                    proto=socket.IPPROTO_TCP,
                    flags=socket.AI_NUMERICHOST,
                )
                for address, at in found
            ]

        async def close(self) -> None:
            """Nothing is held."""

    return Judging()
