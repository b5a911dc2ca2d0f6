"""The manifest: the small JSON document that is a step's output. Lineage is a walk over these, not a second record."""

from __future__ import annotations

import hashlib
import json
import os
import uuid
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from nvila.components.contracts.errors import DataError

Kind = Literal["slices", "report", "dataset", "model", "metrics", "version", "endpoint"]


class File(BaseModel):
    """One file that a step wrote, or a file of the user's that it read."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    uri: str
    """Path relative to the manifest's folder, or an absolute path or `s3://` URI when the bytes live elsewhere."""
    size_bytes: int
    sha256: str


class InputRef(BaseModel):
    """The manifest of another step that this step read."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    step: str
    uri: str
    """Where that manifest lies (`store/<step>/<key>/manifest.json`)."""
    digest: str


class Manifest(BaseModel):
    """What a step made, from what, and how to check it.

    `seconds`, `created`, `folder` and the URIs of inputs are facts of one execution and stay out of `digest`, so that
    the same work done twice, or in another place, has the same identity.
    """

    model_config = ConfigDict(extra="forbid")

    schema_version: Literal[1] = 1
    step: str
    key: str
    kind: Kind
    inputs: dict[str, InputRef] = Field(default_factory=dict)
    sources: list[File] = Field(default_factory=list)
    """The user's own files that were read: the far end of the lineage."""
    files: dict[str, File] = Field(default_factory=dict)
    values: dict[str, Any] = Field(default_factory=dict)
    """Small results as JSON: metrics, counts, names."""
    created: str = ""
    seconds: float = 0.0
    folder: str = ""
    """Where the files lie: the step's folder in the store."""

    @property
    def digest(self) -> str:
        """sha256 over everything that says what the output is (hex, 64 characters)."""
        content = self.model_dump(mode="json", exclude={"created", "seconds", "folder"})
        for ref in content["inputs"].values():
            del ref["uri"]
        return digest_json(content)

    def path(self, name: str) -> Path:
        """Local path of the file called `name`.

        Raises:
            DataError: the manifest names no such file, or the file is gone.
        """
        if name not in self.files:
            raise DataError(
                f"the manifest of step {self.step} names no file {name!r}",
                where=f"{self.folder}/manifest.json",
                value=sorted(self.files),
            )
        path = Path(self.folder, self.files[name].uri)
        if not path.exists():
            raise DataError(
                "a file of the store is gone",
                where=str(path),
                do=f"Remove the folder {self.folder} and run again; the step is then repeated.",
            )
        return path

    def dir(self, prefix: str) -> Path:
        """Local folder that holds the files named `prefix/...` (a checkpoint, say)."""
        if not any(name.startswith(prefix + "/") for name in self.files):
            raise DataError(
                f"the manifest of step {self.step} names no files under {prefix!r}",
                where=f"{self.folder}/manifest.json",
                value=sorted(self.files)[:10],
            )
        return Path(self.folder, prefix)

    def verify(self, *, deep: bool = False) -> list[str]:
        """Names of files that are missing, of another size, or (with `deep`) of another sha256."""
        wrong = []
        for name, file in self.files.items():
            path = Path(self.folder, file.uri)
            same = path.is_file() and path.stat().st_size == file.size_bytes
            if not same or (deep and sha256_file(path) != file.sha256):
                wrong.append(name)
        return wrong

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Manifest:
        """Read a manifest.

        Raises:
            DataError: no such file, or it is not a manifest of this version.
        """
        try:
            return cls.model_validate_json(Path(path).read_bytes())
        except FileNotFoundError as error:
            raise DataError("no manifest here", where=str(path)) from error
        except ValidationError as error:
            raise DataError(
                "not a manifest of schema version 1", where=str(path), value=error.errors()[0]["msg"]
            ) from error

    def save(self, path: Path) -> None:
        """Write by rename, so that a reader sees the whole manifest or none."""
        write_atomic(path, self.model_dump_json(indent=1) + "\n")


def describe_files(folder: Path, patterns: Iterable[str] = ("**/*",)) -> dict[str, File]:
    """Every file under `folder` that matches one of `patterns`, by its relative name, with size and sha256."""
    names = {p.relative_to(folder).as_posix(): p for pattern in patterns for p in folder.glob(pattern) if p.is_file()}
    return {
        name: File(uri=name, size_bytes=path.stat().st_size, sha256=sha256_file(path))
        for name, path in sorted(names.items())
    }


def sha256_file(path: str | os.PathLike[str]) -> str:
    """Hex sha256 of a file's bytes, read in blocks of 1 MiB."""
    digest = hashlib.sha256()
    with Path(path).open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def digest_json(content: Any) -> str:
    """Hex sha256 of the canonical JSON of `content` (sorted keys, no spaces)."""
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=True)
    return hashlib.sha256(text.encode()).hexdigest()


def write_atomic(path: Path, text: str) -> None:
    """Write `text` beside `path` and rename it there; the folder is made when missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # Not the process' number: nodes of a job that write to one volume have the same ones.
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)
