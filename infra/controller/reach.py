"""Whether requests to a Service get to its pods yet: they are ready before every node has heard of them."""

from __future__ import annotations

import asyncio

from nvila.components.contracts.modelrollout import HTTP_PORT
from nvila.components.kube.cluster import Object

SECONDS = 1.0
_LINE = 256
"""More than a status line has."""


def reaches(service: Object | None, port: int = HTTP_PORT) -> bool:
    """Whether a pod behind the Service says that it takes requests; a second is given to it, as other models wait."""
    address = ((service or {}).get("spec") or {}).get("clusterIP", "")
    return bool(address) and asyncio.run(_is_healthy(address, port))


async def _is_healthy(address: str, port: int) -> bool:
    try:
        async with asyncio.timeout(SECONDS):
            reader, writer = await asyncio.open_connection(address, port, limit=_LINE)
            try:
                writer.write(b"GET /health HTTP/1.1\r\nHost: nvila\r\nConnection: close\r\n\r\n")
                return (await reader.readuntil(b"\r\n")).startswith(b"HTTP/1.1 200 ")
            finally:
                writer.close()
    except (OSError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
        return False
