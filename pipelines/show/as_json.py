"""What `--json` prints: one object on stdout, whatever happens. All that is meant for people goes to stderr then."""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from nvila.components.contracts.errors import ConfigError, NvilaError, Preempted, to_record
from nvila.components.contracts.exits import Exit
from nvila.components.contracts.text import say
from nvila.components.tracking.redact import redact, redact_text

OPTION = "--json"
_INTERRUPTED = 130
"""With which click ends a command on Ctrl-C."""

_answer: dict[str, Any] | None = None
"""Of the command that `run` runs."""


def wanted(arguments: Sequence[str]) -> bool:
    """Whether the command line asks for it, whatever else is wrong with it; what stands behind `--` is no option."""
    return OPTION in arguments[: arguments.index("--") if "--" in arguments else None]


def put(content: Mapping[str, Any]) -> None:
    """Give the command's answer; under `run` it is printed when the command has ended."""
    if _answer is None:
        print(_text(content))
    else:
        _answer.update(content)


def refusal(error: Exception) -> dict[str, Any]:
    """The `error` of an answer that is no success and yet all that was asked for."""
    return {"error": to_record(error)}


def run(command: Callable[[], Any]) -> int:
    """Run a command with stdout kept for its answer, and return its exit code.

    Where it raised, the answer has an `error` (see `errors.to_record`), whatever raised it.
    """
    global _answer
    answer: dict[str, Any] = {}
    _answer = answer
    sys.stdout.flush()
    stdout = os.dup(1)
    os.dup2(2, 1)  # for libraries and child processes, too
    try:
        code = int(command() or Exit.DONE)
        if code == _INTERRUPTED:
            raise Preempted("interrupted")
    except Exception as error:
        ours = _readable(error)
        if not isinstance(ours, NvilaError):
            say(redact_text(traceback.format_exc()))
        answer |= refusal(ours)
        code = int(answer["error"]["exit_code"])
    finally:
        _answer = None
    sys.stdout.flush()
    os.dup2(stdout, 1)
    with os.fdopen(stdout, "w", encoding="ascii") as out:
        print(_text(answer), file=out)
    return code


def _text(content: Mapping[str, Any]) -> str:
    return json.dumps(redact(content), indent=1, default=str)


def _readable(error: Exception) -> Exception:
    """The command line's own errors as ours."""
    if words := getattr(error, "format_message", None):
        return ConfigError(
            words().rstrip("."), where="command line", do="`--help` behind the command tells its options."
        )
    return error
