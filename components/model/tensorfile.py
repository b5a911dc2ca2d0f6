"""Safetensors files read and written piece by piece, so that no tensor is ever whole in memory.

The format (8 bytes of header length, a JSON header, the raw tensors) is simple enough to handle here; loading a model
goes through the safetensors library instead (`checkpoint`). Used by `convert` and `describe`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import torch

from nvila.components.contracts.errors import DataError

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
CODES = {dtype: code for code, dtype in DTYPES.items()}
FLOATING = frozenset(("F64", "F32", "F16", "BF16"))
"""Codes that a conversion may turn into one another; eight-bit floats carry scales and stay."""
PIECE_ELEMENTS = 2**23
"""Elements in memory at once: 32 MiB of float32."""
_MOST_HEADER_BYTES = 100 * 2**20


@dataclass(frozen=True)
class Stored:
    """Where a tensor lies."""

    path: Path
    start: int
    """Byte of the file."""
    code: str
    """Dtype, as safetensors writes it."""
    shape: tuple[int, ...]

    @property
    def elements(self) -> int:
        """Number of values."""
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        """Size in the file."""
        return self.elements * width(self.code)


@dataclass(frozen=True)
class Target:
    """A tensor of a file to be written: the first rows of a stored one, in some dtype."""

    name: str
    source: Stored
    code: str
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        """Size in the file."""
        return math.prod(self.shape) * width(self.code)


def width(code: str) -> int:
    """Bytes of one value."""
    return DTYPES[code].itemsize


def read_header(path: Path) -> dict[str, Stored]:
    """Every tensor of a file by name; only the header is read.

    Raises:
        DataError: missing, not safetensors, or a tensor that does not lie inside the file.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 2 <= length <= min(size - 8, _MOST_HEADER_BYTES):
                raise ValueError("no header")
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        return {name: _stored(path, entry, 8 + length, size) for name, entry in header.items()}
    except FileNotFoundError:
        raise DataError("weights are missing", where=str(path), do="Only safetensors are read") from None
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        raise DataError("not a safetensors file", where=str(path), value=str(error)) from None


def _stored(path: Path, entry: dict, begin: int, size: int) -> Stored:
    start, end = entry["data_offsets"]
    stored = Stored(path, begin + start, entry["dtype"], tuple(int(length) for length in entry["shape"]))
    if stored.code not in DTYPES:
        raise ValueError(f"unknown dtype {stored.code}")
    if start < 0 or min(stored.shape, default=0) < 0 or end - start != stored.bytes or begin + end > size:
        raise ValueError("a tensor lies outside of the file")
    return stored


def read_folder(folder: Path) -> dict[str, Stored]:
    """Every tensor of `model.safetensors`, or of the shards that `model.safetensors.index.json` names."""
    index = folder / "model.safetensors.index.json"
    names = ["model.safetensors"]
    if index.is_file():
        try:
            names = sorted({str(name) for name in json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()})
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError("not an index of shards", where=str(index), value=str(error)) from None
    found: dict[str, Stored] = {}
    for name in names:
        if Path(name).name != name:
            raise DataError("an index that leads out of its folder", where=str(index), value=name)
        found |= read_header(folder / name)
    return found


def write_file(path: Path, targets: Iterable[Target]) -> None:
    """Write one file, copying each tensor in pieces; it appears under its name when it is whole.

    Raises:
        DataError: a source ends early.
    """
    targets = list(targets)
    partial = path.with_name(path.name + ".partial")
    with partial.open("wb") as out:
        header = _header(targets)
        out.write(len(header).to_bytes(8, "little") + header)
        for target in targets:
            for piece in _pieces(target):
                out.write(piece)
    partial.rename(path)


def file_bytes(targets: Iterable[Target]) -> int:
    """Size of the file that `write_file` makes."""
    targets = list(targets)
    return 8 + len(_header(targets)) + sum(target.bytes for target in targets)


def _header(targets: list[Target]) -> bytes:
    content: dict[str, object] = {"__metadata__": {"format": "pt"}}
    start = 0
    for target in targets:
        end = start + target.bytes
        content[target.name] = {"dtype": target.code, "shape": list(target.shape), "data_offsets": [start, end]}
        start = end
    text = json.dumps(content, separators=(",", ":")).encode()
    return text + b" " * (-len(text) % 8)


def _pieces(target: Target) -> Iterator[bytearray]:
    """The bytes of a tensor, its dtype changed on the way."""
    source, left = target.source, math.prod(target.shape)
    same = source.code == target.code
    with source.path.open("rb") as file:
        file.seek(source.start)
        while left:
            count = min(left, PIECE_ELEMENTS)
            raw = _read(file, count * width(source.code))
            left -= count
            if same:
                yield raw
                continue
            values = torch.frombuffer(raw, dtype=DTYPES[source.code]).to(DTYPES[target.code])
            yield bytearray(values.view(torch.uint8).numpy().tobytes())


def _read(file: IO[bytes], size: int) -> bytearray:
    raw = bytearray(size)
    if file.readinto(raw) != size:  # type: ignore[attr-defined]
        raise DataError("the file ends in the middle of a tensor", where=file.name)
    return raw
