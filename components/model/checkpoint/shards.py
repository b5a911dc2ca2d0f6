"""Which files of a folder hold its weights: one, or shards with their index. Anything doubtful about that is refused.

A safetensors file that lies there and is not read would be weights left out without a word: a second set of shards, a
shard that the index forgot, an adapter that was never merged.
"""

from __future__ import annotations

import os
from pathlib import Path

from nvila.components.contracts.errors import DataError
from nvila.components.contracts.foreign import read_object
from nvila.components.model.checkpoint.tensorfile import Stored, read_header

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_ADAPTERS = ("adapter_config.json", "adapter_model.bin", "adapter_model.safetensors", "non_lora_trainables.bin")


def read_folder(folder: Path) -> dict[str, Stored]:
    """Every tensor of `model.safetensors`, or of the shards that `model.safetensors.index.json` names.

    Raises:
        DataError: a file is missing or broken, the index and its shards disagree, two files hold a tensor of one name,
            or weights lie beside those that would be read.
    """
    index = folder / INDEX
    weight_map = _weight_map(index) if os.path.lexists(index) else None
    names = [SINGLE] if weight_map is None else sorted(set(weight_map.values()))
    for name in names:
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise DataError("an index that leads out of its folder", where=str(index), value=name)
    found: dict[str, Stored] = {}
    for name in names:
        shard = read_header(folder / name)
        if twice := sorted(found.keys() & shard.keys()):
            raise DataError(
                "two files hold tensors of the same name", where=str(folder), value=[found[twice[0]].path.name, name]
            )
        found |= shard
    if weight_map is not None:
        lies = {tensor: stored.path.name for tensor, stored in found.items()}
        if wrong := sorted(
            tensor for tensor in weight_map.keys() | lies.keys() if weight_map.get(tensor) != lies.get(tensor)
        ):
            raise DataError("the index and its shards disagree", where=str(index), value=wrong[:5])
    require_nothing_beside(folder, names)
    return found


def count(folder: Path) -> int:
    """Values in the weights of a folder, from the headers."""
    return sum(stored.elements for stored in read_folder(folder).values())


def require_nothing_beside(folder: Path, read: list[str]) -> None:
    """Refuse weights of a folder that are not among the files `read`.

    Raises:
        DataError: names them.
    """
    if adapter := next((name for name in _ADAPTERS if (folder / name).exists()), None):
        raise DataError(
            "an adapter lies beside the weights and would be left out",
            where=str(folder),
            value=adapter,
            do="Merge it into the weights first, or remove it",
        )
    if beside := sorted({path.name for path in folder.glob("*.safetensors")} - set(read)):
        raise DataError(
            "weights lie beside those that are read",
            where=str(folder),
            value=beside[:5],
            do=f"Keep one set: {SINGLE}, or the shards that {INDEX} names",
        )


def _weight_map(index: Path) -> dict[str, str]:
    try:
        content = read_object(index)["weight_map"]
        return {str(tensor): str(file) for tensor, file in content.items()}
    except (KeyError, TypeError, AttributeError) as error:
        raise DataError("not an index of shards", where=str(index), value=str(error)) from None
