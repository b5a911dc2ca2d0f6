"""Exit codes of every `nvila` process: what a launcher, a retry policy or a shell script may rely on."""

from enum import IntEnum


class Exit(IntEnum):
    """Why a process ended. Only FAULT and PREEMPTED are ever worth a retry."""

    DONE = 0
    FAULT = 1
    """A fault of ours or of the machine; may be retried within a budget."""
    USER = 2
    """The user's input is wrong; a retry within the same run ends at once with the same."""
    REJECTED = 3
    """A gate or the rollout policy said no; a retry ends as above, everything is kept, the report is written."""
    PREEMPTED = 75
    """Stopped from outside, or by a service that is away; run the same command again and it resumes."""
