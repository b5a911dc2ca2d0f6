"""Asks a running server the pinned prompts, and judges what it says."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from nvila.components.contracts.errors import RolloutError
from nvila.components.contracts.progress import track
from nvila.components.metrics.accuracy import is_correct
from nvila.components.metrics.pinned import Pinned
from nvila.components.rollout.policy import Asked
from nvila.components.serve import server


def observe(url: str, model: str, prompts: Sequence[Pinned], max_tokens: int, api_key: str) -> Asked:
    """Ask a running server every prompt."""
    seen = Asked()
    for prompt in track(prompts, f"pinned prompts to {url}"):
        seen += ask(url, model, prompt, max_tokens, api_key)
    return seen


def ask(url: str, model: str, prompt: Pinned, max_tokens: int, api_key: str) -> Asked:
    """Ask it one."""
    return judged(
        lambda: server.ask(url, model, prompt.question, max_tokens=max_tokens, api_key=api_key),
        prompt.expected,
        prompt.answer,
    )


def judged(ask: Callable[[], server.Answer], expected: str, answer: str) -> Asked:
    """What one question comes to.

    Args:
        ask: asks it.
        expected: what the evaluated model said.
        answer: the truth.
    """
    try:
        said = ask()
    except RolloutError:
        return Asked(asked=1, errors=1)
    return Asked(
        asked=1,
        agreed=is_correct(said.text, expected),
        right=is_correct(said.text, answer),
        without_value=not said.finite,
    )
