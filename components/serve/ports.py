"""Addresses of this machine: a free TCP port, and why nothing can listen at a given one."""

from __future__ import annotations

import errno
import socket


def free_port(host: str) -> int:
    """A port of `host` that nobody listens on now."""
    with socket.socket(_family(host)) as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])


def why_not(host: str, port: int) -> str | None:
    """Why no server of ours can listen there, in words; None where one can."""
    if not 1 <= port <= 65535:
        return "ports go from 1 to 65535"
    if not host or "%" in host or "[" in host:
        return "a host name, or an address without brackets and zone, is needed"
    try:
        with socket.socket(_family(host)) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
    except socket.gaierror:
        return "unknown host"
    except OSError as error:
        return _WORDS.get(error.errno or 0, error.strerror or str(error))
    except (ValueError, TypeError):  # a NUL or half a character in it
        return "unknown host"
    return None


_WORDS = {
    errno.EADDRINUSE: "already in use",
    errno.EADDRNOTAVAIL: "not an address of this machine",
    errno.EACCES: "only root may listen there; ports from 1024 on are for everyone",
    errno.EAFNOSUPPORT: "this machine has no IPv6",
}


def _family(host: str) -> socket.AddressFamily:
    """As vLLM chooses it: a name is resolved to an IPv4 address."""
    return socket.AF_INET6 if ":" in host else socket.AF_INET
