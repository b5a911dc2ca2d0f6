"""Safetensors files read and written piece by piece, so that no tensor is ever whole in memory.

The format (8 bytes of header length, a JSON header, the raw tensors) is simple enough to handle here; the safetensors
library says first whether a file is one. No value that is not finite passes, in or out.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import torch

from nvila.components.contracts.errors import DataError
from nvila.components.contracts.foreign import parse, require_regular

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
PIECE_ELEMENTS = 2**18
"""Elements in memory at once: 1 MiB of float32. Pieces of 32 MiB, for each of which the system finds fresh memory, take
four times as long to convert to bfloat16 (1.9 s for 1.7 GB, against 0.5 s)."""
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
class Later:
    """A tensor of which only shape and dtype are known until it is needed."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    whole: Callable[[], torch.Tensor]

    @property
    def nbytes(self) -> int:
        """Size of its values."""
        return math.prod(self.shape) * self.dtype.itemsize


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


@dataclass(frozen=True)
class Whole:
    """A tensor of a file to be written: one of memory, as it is."""

    name: str
    source: torch.Tensor | Later

    @property
    def code(self) -> str:
        """Dtype, as safetensors writes it."""
        return CODES[self.source.dtype]

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape."""
        return tuple(self.source.shape)

    @property
    def bytes(self) -> int:
        """Size in the file."""
        return self.source.nbytes


def width(code: str) -> int:
    """Bytes of one value."""
    return DTYPES[code].itemsize


def read_header(path: Path) -> dict[str, Stored]:
    """Every tensor of a file by name; only the header is read.

    Raises:
        DataError: missing, not safetensors, or a tensor that does not lie inside the file.
    """
    from safetensors import SafetensorError, safe_open

    try:
        size = require_regular(path)
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 2 <= length <= min(size - 8, _MOST_HEADER_BYTES):
                raise ValueError("no header")
            header = parse(file.read(length))
        header.pop("__metadata__", None)
        found = {name: _stored(path, name, entry, 8 + length, size) for name, entry in header.items()}
        if 8 + length + sum(stored.bytes for stored in found.values()) != size:
            raise ValueError("it is not as long as its tensors")
        with safe_open(path, framework="pt"):
            pass  # overlaps, gaps
        return found
    except (FileNotFoundError, NotADirectoryError):
        raise DataError("weights are missing", where=str(path), do="Only safetensors are read") from None
    except (ValueError, KeyError, TypeError, AttributeError, OSError, RecursionError, SafetensorError) as error:
        raise DataError("not a safetensors file", where=str(path), value=str(error)) from None


def _stored(path: Path, name: str, entry: dict, begin: int, size: int) -> Stored:
    start, end = entry["data_offsets"]
    stored = Stored(path, begin + start, entry["dtype"], tuple(int(length) for length in entry["shape"]))
    if stored.code not in DTYPES:
        raise ValueError(f"{name} has the unknown dtype {stored.code}")
    if start < 0 or min(stored.shape, default=0) < 0 or end - start != stored.bytes or begin + end > size:
        raise ValueError(f"{name} lies outside of the file")
    return stored


def values(stored: Stored, name: str, count: int, dtype: torch.dtype) -> Iterator[torch.Tensor]:
    """The first `count` values of a tensor of floats, flat, in pieces of at most `PIECE_ELEMENTS`, as `dtype`.

    Raises:
        DataError: one is NaN or infinite, or too large for `dtype`; or the file ends early.
    """
    for raw in _pieces(stored, count):
        read = torch.frombuffer(raw, dtype=DTYPES[stored.code])
        piece = read.to(dtype)
        if not is_finite(piece):
            if is_finite(read):
                raise DataError(f"{name} has values too large for {dtype}", where=str(stored.path), do=_WIDER)
            raise DataError(f"{name} has values that are NaN or infinite", where=str(stored.path), do=_BROKEN)
        yield piece


_WIDER = "Use bfloat16 or float32"
_BROKEN = "The checkpoint is damaged, or its training diverged: use another"


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether a tensor has no NaN and no infinity.

    The extremes tell, since NaN is handed on to both: nothing can overflow, and 23 GB/s of bfloat16 go through one core
    (0.8 GB/s through `torch.isfinite`).
    """
    return not tensor.numel() or all(math.isfinite(extreme) for extreme in torch.aminmax(tensor))


def read_tensor(stored: Stored, name: str) -> torch.Tensor:
    """A whole tensor of any dtype.

    Raises:
        DataError: a value of a tensor of floats is not finite, or the file ends early.
    """
    whole = torch.empty(stored.elements, dtype=DTYPES[stored.code])
    if stored.code in FLOATING:
        pieces = values(stored, name, stored.elements, whole.dtype)
    else:
        pieces = (torch.frombuffer(raw, dtype=whole.dtype) for raw in _pieces(stored, stored.elements))
    put(whole, pieces)
    return whole.view(stored.shape)


def put(flat: torch.Tensor, pieces: Iterable[torch.Tensor]) -> None:
    """Fill a flat tensor from pieces that together are as long."""
    at = 0
    for piece in pieces:
        flat[at : at + len(piece)] = piece
        at += len(piece)


def write_file(path: Path, targets: Iterable[Target | Whole]) -> None:
    """Write one file, one tensor after the other; it appears under its name when it is whole.

    Raises:
        DataError: a source ends early, or holds a value that is not finite or does not fit the new dtype.
    """
    targets = list(targets)
    partial = path.with_name(path.name + ".partial")
    with partial.open("wb") as out:
        header = _header(targets)
        out.write(len(header).to_bytes(8, "little") + header)
        for target in targets:
            for piece in _written(target, path):
                out.write(piece.view(torch.uint8).numpy().data)
    partial.rename(path)


def _written(target: Target | Whole, path: Path) -> Iterator[torch.Tensor]:
    """Values of a target, flat: a stored one's in pieces."""
    if isinstance(target, Target):
        yield from values(target.source, target.name, math.prod(target.shape), DTYPES[target.code])
        return
    source = target.source
    whole = source.whole() if isinstance(source, Later) else source
    if target.code in FLOATING and not is_finite(whole):
        raise DataError(f"{target.name} has values that are NaN or infinite", where=str(path.parent))
    yield whole.detach().cpu().contiguous().view(-1)


def file_bytes(targets: Iterable[Target]) -> int:
    """Size of the file that `write_file` makes."""
    targets = list(targets)
    return 8 + len(_header(targets)) + sum(target.bytes for target in targets)


def _header(targets: Sequence[Target | Whole]) -> bytes:
    content: dict[str, object] = {"__metadata__": {"format": "pt"}}
    start = 0
    for target in targets:
        end = start + target.bytes
        content[target.name] = {"dtype": target.code, "shape": list(target.shape), "data_offsets": [start, end]}
        start = end
    text = json.dumps(content, separators=(",", ":")).encode()
    return text + b" " * (-len(text) % 8)


def _pieces(stored: Stored, count: int) -> Iterator[bytearray]:
    """The bytes of the first `count` values."""
    with stored.path.open("rb") as file:
        file.seek(stored.start)
        for begin in range(0, count, PIECE_ELEMENTS):
            yield _read(file, min(PIECE_ELEMENTS, count - begin) * width(stored.code))


def _read(file: IO[bytes], size: int) -> bytearray:
    raw = bytearray(size)
    if file.readinto(raw) != size:  # type: ignore[attr-defined]
        raise DataError("the file ends in the middle of a tensor", where=file.name)
    return raw
