"""Which files of a checkpoint are taken: data only. Code, pickles and anything else are left where they are."""

from pathlib import PurePosixPath

WANTED = ("*.safetensors", "*.safetensors.index.json", "*.json", "*.txt", "*.jinja")


def is_wanted(name: str) -> bool:
    """Whether a file of this name is taken."""
    return any(PurePosixPath(name).match(pattern) for pattern in WANTED)
