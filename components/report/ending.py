"""How a run ended, by what its steps and KFP say; and the line of a log that carries it to whoever has KFP's API only.

That API gives out no artifact of a step but its log, and tells no exit code of ours: KFP's launcher ends with 1
whatever the step ended with. So the last step says it where it can be read.
"""

from __future__ import annotations

import re

from pydantic import ValidationError

from nvila.components.contracts.exits import Exit
from nvila.components.contracts.results.run import Ending
from nvila.components.report.flow import unfinished
from nvila.components.runner.status import Run, Status
from nvila.components.tracking.redact import redact_text

_LINE = "nvila run ended: "
_STOPPED, _FAILED = ("CANCELED", "CANCELLED", "CANCELING"), ("FAILED", "ERROR", "SYSTEM_ERROR")


def ending(run: Run, state: str, message: str | None) -> Ending:
    """How the run ended, by its steps' own status files; what they cannot know, as they were killed, KFP says.

    Only a run whose every step has come through is a success. A step that was killed has left the word `running`; one
    that had not begun has left none, and nobody knows of a fault: the run was ended before its turn.

    Args:
        run: its folder.
        state: what KFP says of the run: SUCCEEDED, FAILED, CANCELLED. Some versions do not know it yet at this point
            and say RUNNING or nothing.
        message: what KFP adds to that.
    """
    if trouble := run.trouble:
        code = trouble.exit_code or Exit.FAULT
        if trouble.status is Status.REJECTED:
            return Ending(outcome="rejected", exit_code=code, step=trouble.name, message=trouble.message)
        if trouble.status is Status.PREEMPTED:
            return Ending(outcome="stopped", exit_code=code, step=trouble.name, message=trouble.message)
        return Ending(outcome="failed", exit_code=code, step=trouble.name, message=trouble.message)
    said, lost = (state or "").upper(), run.lost
    name, message = lost.name if lost else None, redact_text(message) if message else None
    if said in _STOPPED:
        return Ending(outcome="stopped", exit_code=Exit.PREEMPTED, step=name, message=message)
    if lost or said in _FAILED:
        why = message or "a step's pod was lost or never started; the run's page in KFP says more"
        return Ending(outcome="failed", exit_code=Exit.FAULT, step=name, message=why)
    if left := unfinished(run):
        why = f"the run was ended before {left[0]} began"
        return Ending(outcome="stopped", exit_code=Exit.PREEMPTED, message=why)
    return Ending(outcome="succeeded", exit_code=Exit.DONE)


def as_line(ended: Ending) -> str:
    """One line for the log."""
    return f"{_LINE}{ended.model_dump_json()}"


def in_log(text: str) -> Ending | None:
    """The newest such line of a log; None where there is none, or it is of a version that says it otherwise."""
    for said in reversed(re.findall(f"{_LINE}(.+)", text)):
        try:
            return Ending.model_validate_json(said.strip())
        except ValidationError:
            continue
    return None
