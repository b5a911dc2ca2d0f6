"""The manifest: the small JSON document that is a step's output. Lineage is a walk over these, not a second record."""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any, Literal, TypeVar

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    computed_field,
    field_serializer,
    field_validator,
    model_validator,
)
from pydantic.functional_validators import ModelWrapValidatorHandler

from nvila.components.contracts.digests import sha256_file as sha256_file
from nvila.components.contracts.digests import sha256_of
from nvila.components.contracts.errors import DamagedError, DataError, NvilaError
from nvila.components.contracts.files import digest_json as digest_json
from nvila.components.contracts.files import read_bytes
from nvila.components.contracts.files import write_atomic as write_atomic
from nvila.components.contracts.results.result import Result
from nvila.components.contracts.steps import result_type

R = TypeVar("R", bound=Result)

MANIFEST = "manifest.json"
SUSPECT = "suspect"
"""Beside a manifest: a reader found the work damaged. Whoever wants to skip the work looks at it closely first."""
START = "start"
"""Name of an input that is no step's of the pipeline: the model of another run that training started from. Its digest
is in the content key by what the step reads outside the store."""
SCHEMA_VERSION = 2
KEY_CHARACTERS = 20
"""Characters of the 64 that name the folder: 80 bits, so that two keys never meet and paths stay readable."""
AGAIN = "Run the recipe again: the step is then repeated."
Kind = Literal["slices", "report", "dataset", "model", "metrics", "version", "endpoint"]


class OlderVersion(DataError):
    """A manifest that an older version of the platform wrote: the work is done again where it is wanted."""


class File(BaseModel):
    """One file that a step wrote, or a file of the user's that it read."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    uri: str
    """Path of a step's file below the manifest's folder; of the user's, an absolute path or an `s3://` URI."""
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

    `seconds`, `created`, `machine`, `folder` and the URIs of inputs are facts of one execution and stay out of
    `digest`, so that the same work done twice, or in another place, has the same identity. So does `key`: where a step
    runs again for an edit and makes the same, nothing behind it runs. Written out, it carries its digest; read in, it
    must have the digest that it carries.
    """

    model_config = ConfigDict(extra="forbid", ser_json_inf_nan="constants")

    schema_version: Literal[2] = 2
    step: str
    key: str
    kind: Kind
    inputs: dict[str, InputRef] = Field(default_factory=dict)
    sources: list[File] = Field(default_factory=list)
    """The user's own files that were read: the far end of the lineage."""
    files: dict[str, File] = Field(default_factory=dict)
    result: Result | None = None
    """What the step found out, in the form of that step (see `results`); None where it has nothing to tell."""
    created: str = ""
    seconds: float = 0.0
    machine: dict[str, Any] = Field(default_factory=dict)
    """Where the work was done: `threads` and `cpu`. With others the same work may round differently."""
    folder: str = ""
    """Where the files lie: the step's folder in the store."""

    @field_validator("step", "key")
    @classmethod
    def _plain(cls, name: str) -> str:
        if not re.fullmatch(r"\w[\w.-]*", name):
            raise ValueError(f"{name!r} is no plain name")
        return name

    @field_validator("result", mode="before")
    @classmethod
    def _of_its_step(cls, result: Any, info: ValidationInfo) -> Any:
        kind = result_type(info.data.get("step", ""))
        if result is None or isinstance(result, kind):
            return result
        try:
            return kind.model_validate(result)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, ("result", *first["loc"])))
            raise ValueError(f"{where} is no {kind.__name__}'s: {first['msg']}") from None

    @field_serializer("result")
    def _as_told(self, result: Result | None) -> dict[str, Any] | None:
        """Without what the step left at its default: a field that is new has no part in the digest of older work."""
        return result.model_dump(mode="json", exclude_unset=True) if result else None

    @field_validator("files")
    @classmethod
    def _below(cls, files: dict[str, File]) -> dict[str, File]:
        for file in files.values():
            path = PurePosixPath(file.uri)
            if path.is_absolute() or ".." in path.parts or "\0" in file.uri or str(path) != file.uri or not path.parts:
                raise ValueError(f"the file {file.uri!r} is not below the step's folder")
        return files

    @model_validator(mode="wrap")
    @classmethod
    def _as_written(cls, content: Any, build: ModelWrapValidatorHandler[Manifest]) -> Manifest:
        if not isinstance(content, dict) or "digest" not in content:
            return build(content)
        manifest = build({name: value for name, value in content.items() if name != "digest"})
        if content["digest"] != manifest.digest:
            raise ValueError(f"its content has the digest {manifest.digest[:12]}, not the one that it carries")
        return manifest

    @computed_field  # type: ignore[prop-decorator]
    @property
    def digest(self) -> str:
        """sha256 over everything that says what the output is (hex, 64 characters)."""
        content = self.model_dump(mode="json", exclude={"key", "created", "seconds", "machine", "folder", "digest"})
        for ref in content["inputs"].values():
            del ref["uri"]
        return digest_json(content)

    def told(self, kind: type[R]) -> R:
        """The result, which is of this kind.

        Raises:
            DamagedError: the step has told something else, or nothing.
        """
        if not isinstance(self.result, kind):
            raise DamagedError(f"no {kind.__name__} of {self.step}", where=f"{self.folder}/{MANIFEST}", do=AGAIN)
        return self.result

    def path(self, name: str, *, fresh: bool = False) -> Path:
        """Local path of the file called `name`, whose bytes are those that the step wrote.

        Args:
            name: of the file.
            fresh: read the bytes now; without, the index is believed where the file's facts are unchanged.

        Raises:
            DataError: the manifest names no such file.
            DamagedError: the file is gone, changed, or a link.
        """
        if name not in self.files:
            raise DataError(
                f"the manifest of step {self.step} names no file {name!r}",
                where=f"{self.folder}/{MANIFEST}",
                value=sorted(self.files),
            )
        self._require([name], fresh)
        return Path(self.folder, self.files[name].uri)

    def dir(self, prefix: str, *, fresh: bool = False) -> Path:
        """Local folder that holds the files named `prefix/...` (a checkpoint, say) as the step wrote them, and no more.

        Raises:
            DataError: the manifest names no such files.
            DamagedError: a file is gone, changed, a link, or one that no step wrote: loaders take what lies there.
        """
        names = [name for name in self.files if name.startswith(prefix + "/")]
        if not names:
            raise DataError(
                f"the manifest of step {self.step} names no files under {prefix!r}",
                where=f"{self.folder}/{MANIFEST}",
                value=sorted(self.files)[:10],
            )
        self._require(names, fresh)
        if strangers := self.strangers(prefix):
            self._refuse(strangers[0], "the step wrote no such file", do=f"Remove it. {AGAIN}")
        return Path(self.folder, prefix)

    def origin(self, name: str) -> Manifest:
        """The manifest that the step read as its input `name`; it lies in the store that this one lies in.

        Raises:
            DataError, DamagedError: as `load`.
            DamagedError: it is another than the step read.
        """
        ref = self.inputs[name]
        place = Path(self.folder).parents[1].joinpath(*Path(ref.uri).parts[-3:])
        found = Manifest.load(place)
        if found.digest != ref.digest:
            raise DamagedError(f"not the output of step {ref.step} that {self.step} read", where=str(place), do=AGAIN)
        return found

    def verify(self, *, deep: bool = False) -> list[str]:
        """Names of files that are missing, links, of another size, or (`deep` reads them all) of another sha256."""
        return list(self.faults(deep=deep, fresh=True))

    def faults(self, names: Iterable[str] | None = None, *, deep: bool, fresh: bool) -> dict[str, str]:
        """What is wrong with each of the named files that is not as the step wrote it; of all files by default."""
        chosen = self.files if names is None else {name: self.files[name] for name in names}
        return faults_of(Path(self.folder), chosen, deep=deep, fresh=fresh)

    def strangers(self, prefix: str) -> list[Path]:
        """What lies in the folder `prefix` and is no file that the step wrote, nor a folder of such."""
        known = {Path(self.folder, file.uri) for file in self.files.values()}
        folders = {parent for path in known for parent in path.parents}
        return sorted(path for path in Path(self.folder, prefix).rglob("*") if path not in known | folders)

    def _require(self, names: list[str], fresh: bool) -> None:
        for name, why in self.faults(names, deep=True, fresh=fresh).items():
            self._refuse(Path(self.folder, self.files[name].uri), why)

    def _refuse(self, path: Path, why: str, do: str = AGAIN) -> None:
        """Mark the work, so that nobody skips it unseen, and say what is wrong."""
        if Path(self.folder, MANIFEST).is_file():
            try:
                write_atomic(Path(self.folder, SUSPECT), f"{path}: {why}\n")
            except OSError as error:
                do = f"Remove {self.folder}, which this process may not ({error.strerror}). {do}"
        raise DamagedError(f"damaged output of step {self.step}: {why}", where=str(path), do=do)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Manifest:
        """Read a manifest. Of a `manifest.json` the files are those beside it, wherever it was written: stores move.

        Raises:
            DataError: no such file, or one of another version of the platform (`OlderVersion`).
            DamagedError: not a manifest, cut off, edited since it was written, or with the result of another step.
        """
        place = Path(path).absolute()
        try:
            content = json.loads(read_bytes(place).decode())
        except FileNotFoundError as error:
            raise DataError("no manifest here", where=str(path)) from error
        except OSError as error:
            raise DamagedError(
                "the manifest cannot be read", where=str(path), value=error.strerror, do=AGAIN
            ) from error
        except (ValueError, RecursionError) as error:
            raise DamagedError("the manifest is cut off or no JSON", where=str(path), do=AGAIN) from error
        version = content.get("schema_version") if isinstance(content, dict) else None
        if isinstance(version, int) and version != SCHEMA_VERSION:
            older = version < SCHEMA_VERSION
            raise (OlderVersion if older else DataError)(
                f"written by {'an older' if older else 'a newer'} version of the platform (schema {version}; this one "
                f"reads schema {SCHEMA_VERSION})",
                where=str(path),
                do=AGAIN if older else "Use the version that wrote it, or another store.",
            )
        if not isinstance(content, dict) or "digest" not in content:
            raise DamagedError("not a manifest, or one without its digest", where=str(path), do=AGAIN)
        try:
            manifest = cls.model_validate(content)
        except ValidationError as error:
            message = error.errors()[0]["msg"].removeprefix("Value error, ")
            raise DamagedError(f"the manifest was damaged or edited: {message}", where=str(path), do=AGAIN) from error
        if place.name == MANIFEST:
            manifest.folder = str(place.parent)
        return manifest

    def save(self, path: Path) -> None:
        """Write by rename, so that a reader sees the whole manifest or none."""
        write_atomic(path, self.model_dump_json(indent=1) + "\n")


def written_by(folder: Path) -> Manifest | None:
    """The manifest of the step that wrote the checkpoint in `folder`, whose bytes are read now and found to be its own.

    None where nothing vouches for the folder, as for a checkpoint from elsewhere. Links lead to where it was written.

    Raises:
        DamagedError: the manifest beside the folder, or a file that it names, is not what was written.
    """
    folder = folder.resolve()
    place = folder.parent / MANIFEST
    if not os.path.lexists(place):
        return None
    manifest = Manifest.load(place).model_copy(update={"folder": str(folder.parent)})
    if any(name.startswith(folder.name + "/") for name in manifest.files):
        manifest.dir(folder.name, fresh=True)
        return manifest
    return None


def describe_files(folder: Path, patterns: Iterable[str] = ("**/*",)) -> dict[str, File]:
    """Every file under `folder` that matches one of `patterns`, by its relative name, with size and sha256.

    Raises:
        NvilaError: one of them is a link: what it leads to is nobody's to keep.
    """
    names = {p.relative_to(folder).as_posix(): p for pattern in patterns for p in folder.glob(pattern) if p.is_file()}
    if link := next((path for path in names.values() if path.is_symlink()), None):
        raise NvilaError("a step must not leave a link in its output", where=str(link))
    digests = sha256_of(names.values())
    return {
        name: File(uri=name, size_bytes=path.stat().st_size, sha256=digests[path])
        for name, path in sorted(names.items())
    }


def faults_of(folder: Path, files: Mapping[str, File], *, deep: bool, fresh: bool) -> dict[str, str]:
    """What is wrong with each of the files below `folder` that is not as the step wrote it; without `deep` not read."""
    found = {name: why for name, file in files.items() if (why := _looks(folder, file))}
    paths = {name: folder / file.uri for name, file in files.items() if name not in found} if deep else {}
    try:
        digests = sha256_of(paths.values(), fresh=fresh)
    except OSError:  # one that cannot be read must not hide the others
        digests = {path: _digest_or_reason(path, fresh) for path in paths.values()}
    for name, path in paths.items():
        if digests[path] != files[name].sha256:
            found[name] = "its bytes are not those that the step wrote"
    return found


def _looks(folder: Path, file: File) -> str | None:
    path = folder / file.uri
    steps = [path, *list(path.parents)[: len(PurePosixPath(file.uri).parts) - 1]]
    if link := next((step for step in steps if step.is_symlink()), None):
        return f"{link.name} is a link, where the step wrote none"
    try:
        facts = path.lstat()
    except OSError:
        return "it is gone"
    if not stat.S_ISREG(facts.st_mode):
        return "it is no file"
    if facts.st_size != file.size_bytes:
        return f"it has {facts.st_size} bytes and had {file.size_bytes}"
    return None


def _digest_or_reason(path: Path, fresh: bool) -> str:
    try:
        return sha256_of([path], fresh=fresh)[path]
    except OSError as error:
        return str(error)
