"""Which metrics there are, and what each is called in a sentence. How one scores stands in `metrics/accuracy.py`."""

from collections.abc import Iterable, Mapping
from typing import Literal

Metric = Literal["accuracy"]
METRICS: Mapping[str, str] = {"accuracy": "exact match"}


def named(source: str, metric: str) -> str:
    """The source, with its metric where that is not the usual one."""
    return source if metric == "accuracy" else f"{source} ({in_words([metric])})"


def in_words(metrics: Iterable[str]) -> str:
    """What was measured, each metric once."""
    return " and ".join(dict.fromkeys(METRICS.get(metric, metric) for metric in metrics))
