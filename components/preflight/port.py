"""Who listens on the serving port: nobody, our own endpoint of an earlier run, or someone else."""

from __future__ import annotations

import json
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psutil

OUR_COMMANDS = ("vllm", "nvila")
"""A server of ours has one of these in its command line."""


@dataclass(frozen=True)
class Server:
    """A server that a rollout started and that is still alive."""

    pid: int
    url: str

    @property
    def port(self) -> int | None:
        """TCP port of its URL."""
        return urlsplit(self.url).port


def our_servers(serving: Path) -> list[Server]:
    """Live servers recorded in `runs/serving/*.json`; records of dead ones are passed over."""
    records = (_read(path) for path in sorted(serving.glob("*.json")))
    return [Server(r["pid"], str(r.get("url", ""))) for r in records if isinstance(r.get("pid"), int) and _ours(r)]


def port_problem(host: str, port: int, serving: Path) -> str | None:
    """Why the endpoint cannot have the port, or None: it is free, or our own endpoint holds it."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            if any(server.port == port for server in our_servers(serving)):
                return None
            return (
                f"rollout.port: {host}:{port} is in use by someone else ({error.strerror}); free it or choose another"
            )
    return None


def _read(path: Path) -> dict[str, Any]:
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


def _ours(record: dict[str, Any]) -> bool:
    """The very process: same start time as recorded, and a server's command line."""
    try:
        process = psutil.Process(record["pid"])
        command = " ".join(process.cmdline()).lower()
        return process.create_time() == record.get("born") and any(word in command for word in OUR_COMMANDS)
    except psutil.Error:
        return False
