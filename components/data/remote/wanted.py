"""Which files of a checkpoint are taken: data only. Code, pickles and anything else are left where they are."""

from collections.abc import Sequence
from pathlib import PurePosixPath

WANTED = ("*.safetensors", "*.safetensors.index.json", "*.json", "*.txt", "*.jinja")

DESCRIBING = ("*.json", "*.txt", "*.jinja")
"""Those of them that say what the weights are: configurations, tokenizers, lists of shards."""


def is_wanted(name: str, patterns: Sequence[str] = WANTED) -> bool:
    """Whether a file of this name is taken."""
    return any(PurePosixPath(name).match(pattern) for pattern in patterns)
