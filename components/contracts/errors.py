"""The one family of errors. Each message says what is wrong, where, which value, and what to do about it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from nvila.components.contracts.exits import Exit
from nvila.components.contracts.text import brief


class NvilaError(Exception):
    """Base of all our errors.

    Args:
        what: the problem in one short sentence, without a full stop.
        where: file, `file:line`, or dotted recipe option.
        value: the offending value, shown with `repr`.
        do: what the user can do next, in one sentence.
        details: what programs may want to know besides, as JSON.
    """

    exit_code: ClassVar[Exit] = Exit.FAULT

    def __init__(
        self,
        what: str,
        *,
        where: str | None = None,
        value: Any = None,
        do: str | None = None,
        details: Mapping[str, Any] | None = None,
    ) -> None:
        self.what, self.where, self.value, self.do, self.details = what, where, value, do, details
        message = what
        if where is not None:
            message = f"{brief(where, 300)}: {message}"
        if value is not None:
            message += f" (got {_short(value)})"
        if do is not None:
            message += f". {do}"
        super().__init__(message)

    def __reduce__(self) -> tuple[Any, ...]:
        """Errors travel between processes as they are, whatever arguments their class takes."""
        return _rebuild, (type(self), str(self), self.__dict__)


class ConfigError(NvilaError):
    """The recipe or a command-line option is wrong."""

    exit_code = Exit.USER


class DataError(NvilaError):
    """The user's data or media cannot be used."""

    exit_code = Exit.USER


class PreflightError(NvilaError):
    """Something the run will need is not there: memory, disk, a port, a package version, a credential."""

    exit_code = Exit.USER


class DamagedError(NvilaError):
    """A file of the store is not what a step wrote there. The work is done again by the next run."""


class TrainingError(NvilaError):
    """Training cannot go on (a loss that is not finite, a checkpoint that does not match)."""


class QuantizationError(NvilaError):
    """The quantized model is not what was asked for (a pattern that matches nothing, a layer left out)."""


class RolloutError(NvilaError):
    """A server did not start, did not answer, or died."""


class Rejected(NvilaError):
    """A gate or the rollout policy refused the model; nothing is broken and nothing is lost."""

    exit_code = Exit.REJECTED


class Cancelled(NvilaError):
    """Somebody deleted the job that was doing the work; nothing is to bring it back by itself."""

    exit_code = Exit.USER


class Preempted(NvilaError):
    """The step was asked to stop; its progress is saved and the same command resumes it."""

    exit_code = Exit.PREEMPTED


class Unreachable(NvilaError):
    """Another service did not answer, or its content changed while it was read; the same command goes on later."""

    exit_code = Exit.PREEMPTED


def to_record(error: BaseException) -> dict[str, Any]:
    """The error as JSON: for another process, for who reads a run's records, and for `--json`."""
    ours = error if isinstance(error, NvilaError) else NvilaError(str(error))
    value = f" (got {_short(ours.value)})" if ours.value is not None else ""
    return {
        "kind": type(error).__name__,
        "message": f"{ours.what}{value}",
        "where": ours.where,
        "do": ours.do,
        "exit_code": int(ours.exit_code),
        "details": ours.details,
    }


def from_record(record: Mapping[str, Any]) -> NvilaError:
    """The error that was written with `to_record`; its class and exit code are kept."""
    kinds = {kind.__name__: kind for kind in NvilaError.__subclasses__()}
    made = kinds.get(record["kind"], NvilaError)
    told = {name: record.get(name) for name in ("where", "do", "details")}
    error = made(record["message"], **told)
    error.exit_code = Exit(record["exit_code"])  # type: ignore[misc]
    return error


def _rebuild(kind: type[NvilaError], message: str, state: dict[str, Any]) -> NvilaError:
    error = kind.__new__(kind, message)
    error.__dict__.update(state)
    return error


def _short(value: Any, limit: int = 200) -> str:
    text = repr(value)
    return text if len(text) <= limit else text[: limit - 3] + "..."
