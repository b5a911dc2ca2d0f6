"""TCP ports of this machine: a free one, and why a given one cannot be had."""

from __future__ import annotations

import socket


def free_port(host: str) -> int:
    """A port of `host` that nobody listens on now."""
    with socket.socket(_family(host)) as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])


def why_taken(host: str, port: int) -> str | None:
    """The system's reason why nothing can listen there; None where something can."""
    with socket.socket(_family(host)) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            return error.strerror
    return None


def _family(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET
