"""What a version's requests have come to, as `Counters`: by Envoy, which sees each of them, and by vLLM's metrics."""

from __future__ import annotations

import re
from collections import defaultdict

from nvila.components.contracts.counters import Counters
from nvila.components.serve import envoy, server

_LINE = re.compile(r"^(vllm:[a-z_]+)(?:\{.*\})? ([0-9][-+0-9.e]*)$", re.MULTILINE)
"""Of a metric of vLLM in Prometheus' text form: its name, and a value that is a number."""
_FIRST, _LATER = "vllm:time_to_first_token_seconds", "vllm:inter_token_latency_seconds"


def times(url: str) -> Counters | None:
    """First and later tokens of all answers of a server so far, and their seconds; None where it does not say."""
    text = server.get(f"{url}/metrics") if url else None
    return None if text is None else read_times(text)


def requests(admin: str, url: str) -> Counters | None:
    """What Envoy has sent to a server, and how much of that failed; None where it does not say."""
    try:
        seen = envoy.Admin(admin).counters().get(envoy.server_of(url))
    except OSError:
        return None
    return sent(seen) if seen else None


def sent(seen: envoy.Counters) -> Counters:
    """The same of what Envoy says."""
    # Of an answer that broke off, it has seen a good beginning.
    return Counters(requests=seen.requests, errors=max(seen.errors, seen.broken))


def read_times(metrics: str) -> Counters:
    """The same of the text of `/metrics`. Requests and errors are not in it: a server that died counts none."""
    sums: dict[str, float] = defaultdict(float)
    for name, value in _LINE.findall(metrics):
        sums[name] += float(value)  # of several engines
    return Counters(
        first_tokens=int(sums[f"{_FIRST}_count"]),
        first_token_seconds=sums[f"{_FIRST}_sum"],
        tokens=int(sums[f"{_LATER}_count"]),
        token_seconds=sums[f"{_LATER}_sum"],
    )
