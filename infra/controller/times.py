"""Times as Kubernetes writes them: RFC 3339 in UTC."""

from __future__ import annotations

from datetime import UTC, datetime


def stamp(seconds: float) -> str:
    """Seconds since the epoch, to the millisecond."""
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def seconds_since(text: str, now: float) -> float:
    """From then to now (seconds since the epoch); what lies ahead, by another machine's clock, is now."""
    return max(0.0, now - datetime.fromisoformat(text.replace("Z", "+00:00")).timestamp())
