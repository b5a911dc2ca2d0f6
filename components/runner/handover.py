"""Files by which a step hands its work to a job in other processes, and by which the job answers.

They lie in a folder per attempt inside the step's folder, apart from its output: `job.json` says what to do,
`outcome.json` what was made, `verdict-N.json` why node N stopped. A new job is a new attempt, so that no answer of an
earlier one is ever taken for its own.
"""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, TypeAdapter

from nvila.components.contracts.errors import NvilaError, from_record, to_record
from nvila.components.contracts.exits import Exit
from nvila.components.contracts.manifest import Manifest, write_atomic
from nvila.components.contracts.step import Outcome
from nvila.components.contracts.steps import result_type
from nvila.components.runner.code import code_digest
from nvila.components.runner.work import Work

FOLDER = ".job"
"""Inside the step's folder; no part of the output."""
JOB = "job.json"
OUTCOME = "outcome.json"
_WEIGHT = {Exit.USER: 0, Exit.REJECTED: 0, Exit.FAULT: 1, Exit.PREEMPTED: 2}
"""Which of several nodes' verdicts counts: a node that was stopped only knows that another had failed."""


class Assignment(BaseModel):
    """What a node of the job reads."""

    model_config = ConfigDict(extra="forbid")

    step: str
    module: str
    code: str
    """Digest of our code as the step's own process has it."""
    settings: dict[str, Any]
    inputs: dict[str, Manifest]
    out: Path
    run_dir: Path


def hand_over(work: Work, attempt: str) -> Path:
    """Write the assignment of a new attempt and return its path."""
    assignment = Assignment(
        step=work.step,
        module=work.module,
        code=code_digest(),
        settings=dict(work.settings),
        inputs=dict(work.inputs),
        out=work.out,
        run_dir=work.run_dir,
    )
    path = folder_of(work.out, attempt) / JOB
    write_atomic(path, assignment.model_dump_json(indent=1))
    return path


def folder_of(out: Path, attempt: str) -> Path:
    """Where an attempt's files lie.

    Raises:
        NvilaError: not the name of an attempt; it comes from outside and must not lead elsewhere.
    """
    if not re.fullmatch(r"[0-9a-f]{1,32}", attempt):
        raise NvilaError("not the name of an attempt", where=str(out), value=attempt)
    return out / FOLDER / attempt


def write_outcome(folder: Path, outcome: Outcome) -> None:
    """Leave what the step made."""
    plain = {
        "sources": [file.model_dump() for file in outcome.sources],
        "start": outcome.start and outcome.start.model_dump(),
        "result": outcome.result.model_dump(mode="json", exclude_unset=True) if outcome.result else None,
    }
    write_atomic(folder / OUTCOME, json.dumps(dataclasses.asdict(outcome) | plain))


def write_verdict(folder: Path, node: int, error: NvilaError) -> None:
    """Leave why this node stopped."""
    write_atomic(folder / f"verdict-{node}.json", json.dumps(to_record(error)))


def clear_verdict(folder: Path, node: int) -> None:
    """Forget why this node stopped the last time, as the job has started it again."""
    (folder / f"verdict-{node}.json").unlink(missing_ok=True)


def read_outcome(folder: Path, step: str) -> Outcome | None:
    """What the step of this name made, or None where the job has left nothing."""
    # Listing first: a network file system remembers for a while that a file was missing.
    if not folder.is_dir() or OUTCOME not in {path.name for path in folder.iterdir()}:
        return None
    try:
        record = json.loads((folder / OUTCOME).read_bytes())
        told = record["result"] and result_type(step).model_validate(record["result"])
        return TypeAdapter(Outcome).validate_python(record | {"result": told})
    except (ValueError, KeyError, TypeError):  # a machine that went down with the file in its cache leaves it empty
        return None


def read_verdict(folder: Path) -> NvilaError | None:
    """Why the job stopped: of the nodes' verdicts the one that explains most."""
    errors = filter(None, map(_verdict, sorted(folder.glob("verdict-*.json"), key=lambda path: (len(path.name), path))))
    return min(errors, key=lambda error: _WEIGHT[error.exit_code], default=None)


def _verdict(path: Path) -> NvilaError | None:
    """None where the file cannot be read, as above."""
    try:
        return from_record(json.loads(path.read_text()))
    except (ValueError, KeyError, TypeError):
        return None
