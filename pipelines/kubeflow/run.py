"""A run on Kubeflow as its server tells it: steps, how it ended, logs. Why it ended, its last step tells in its log."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from rich.console import Console

from nvila.components.contracts.errors import ConfigError, Preempted
from nvila.components.contracts.exits import Exit
from nvila.components.contracts.pipelines import PIPELINES, Pipeline
from nvila.components.contracts.results.run import Ending
from nvila.components.contracts.steps import REPORT
from nvila.components.contracts.text import say, shell_word
from nvila.components.report.ending import in_log
from nvila.components.tracking.redact import tell
from nvila.pipelines.kubeflow.connection import patiently, plain
from nvila.pipelines.kubeflow.server import Server
from nvila.pipelines.kubeflow.tasks import NO_REASON, failed, newest, reason, states
from nvila.pipelines.show.standing import Standing, follow
from nvila.pipelines.show.watch import print_line

if TYPE_CHECKING:
    from kfp_server_api import V2beta1PipelineTaskDetail, V2beta1Run

POLL_SECONDS = 5.0
PATIENCE_SECONDS = 1800.0
"""How long who waits bears with a server that is down: an upgrade of the cluster's control plane."""
_OVER = ("SUCCEEDED", "SKIPPED", "FAILED", "CANCELED")
_WORDS = {"rejected": "rejected", "stopped": "preempted", "failed": "failed"}
"""Of the step that ended the run, by its outcome."""


class KubeflowRun:
    """One run (a `show.standing.Source`)."""

    def __init__(self, server: Server, run_id: str) -> None:
        self._server, self._id, self._url = server, run_id, server.run_url(run_id)
        self._patience_seconds = 0.0
        self._say: Callable[[str], None] = say
        self._asked = 0.0
        self._run: V2beta1Run = None

    def look(self) -> Standing:
        """How it stands. The server is asked every `POLL_SECONDS` at most; seconds of running steps go on meanwhile.

        Raises:
            NotFound: there is none of this id, or none any more.
            NvilaError: the server is down, or refuses.
        """
        if self._run is None or (self._run.state not in _OVER and time.monotonic() - self._asked >= POLL_SECONDS):
            self._run = self._patiently(lambda: self._server.run(self._id))
            self._asked = time.monotonic()
        steps = states(self._run, self._pipeline)
        ended = self._ending if self._run.state in _OVER else None
        if ended and ended.step:
            word = _WORDS.get(ended.outcome, ended.outcome)
            steps = [
                replace(step, status=word, note=ended.message or "") if step.name == ended.step else step
                for step in steps
            ]
        return Standing(self._run.display_name or self._id, self._url, steps, ended)

    def log(self, step: str) -> str:
        """What the newest pod of a step has printed; a pod that runs still has no log here.

        Raises:
            ConfigError: the pipeline has no such step, or Kubeflow no log of it.
        """
        self.look()
        if step not in self._pipeline.rows:
            known = ", ".join(self._pipeline.rows)
            raise ConfigError("the pipeline has no such step", where="STEP", value=step, do=f"Name one of {known}.")
        task = newest(self._run).get(step)
        if task is None:
            raise ConfigError("the step has not begun", where=step)
        text = self._log_of(task)
        if text is None and task.state in ("RUNNING", "PENDING"):
            raise ConfigError(
                "the step is running; Kubeflow has its log once it has ended",
                where=step,
                do=f"kubectl logs -l pipeline/runid={self._id} -c main --prefix shows what its pods say now.",
            )
        if text is None:
            raise ConfigError(
                "Kubeflow has no log of this step", where=step, do="Is archiveLogs on, as KFP's own manifests have it?"
            )
        return text

    def wait(self, console: Console) -> Standing:
        """Show the steps until the run has ended, and return how it did; Ctrl-C asks what to do with it.

        Raises:
            Preempted: it was left to go on, or cancelled.
            NotFound: it is gone.
            Unreachable: the server stayed away; the run goes on.
        """
        self._patience_seconds = PATIENCE_SECONDS
        self._say = lambda line: print_line(console, tell(line))
        while True:
            try:
                return follow(self, console)
            except KeyboardInterrupt:
                answer = _asked()
            if answer == "c":
                self._server.terminate(self._id)
                raise Preempted("cancelled", do="What is finished stays in the store; the next run goes on from there.")
            if answer == "l":
                again = f"nvila status {shell_word(self._id)} --host {shell_word(self._server.host)} --wait"
                raise Preempted(f"the run goes on: {self._url}", do=f"`{again}` goes on waiting.")

    @property
    def _pipeline(self) -> Pipeline:
        """The one whose form the run was started with."""
        given = (self._run.runtime_config and self._run.runtime_config.parameters) or {}
        return next((p for p in PIPELINES.values() if p.form.keys() == given.keys()), PIPELINES["lifecycle"])

    @cached_property
    def _ending(self) -> Ending:
        """Of a run that is over. KFP's own word where it is enough, and where the last step has left none."""
        state = self._run.state
        if state in ("SUCCEEDED", "SKIPPED"):
            return Ending(outcome="succeeded", exit_code=Exit.DONE)
        report = newest(self._run).get(REPORT)
        said = self._patiently(lambda: self._log_of(report)) if report else None
        found = in_log(said) if said else None
        if state == "CANCELED":
            step = found.step if found else None
            return Ending(outcome="stopped", exit_code=Exit.PREEMPTED, step=step, message="the run was cancelled")
        if found and found.exit_code is not Exit.DONE:
            return found
        first = next(iter(failed(self._run)), None)
        why = reason(first) if first else plain(self._run.error.message) if self._run.error else NO_REASON
        if found is None:
            why += "; the step report tells nothing: it did not run, or archiveLogs is off"
        return Ending(outcome="failed", exit_code=Exit.FAULT, step=first.display_name if first else None, message=why)

    def _log_of(self, task: V2beta1PipelineTaskDetail) -> str | None:
        """A step is a node of Argo's whose child, the executor, has the pod; with the retries between them."""
        nodes = [child.pod_name for child in task.child_tasks or [] if child.pod_name] or [task.pod_name]
        return self._server.log(self._id, nodes[-1]) if nodes[-1] else None

    def _patiently(self, call: Callable[[], Any]) -> Any:
        return patiently(call, self._patience_seconds, self._say, POLL_SECONDS)


def _asked() -> str:
    """c, l or w: what to do with the run. Where nobody can be asked, or does not want to be, it is left alone."""
    if not sys.stdin.isatty():
        return "l"
    try:
        while True:
            answer = input("\nCancel the run (c), leave it running (l), or go on waiting (w)? ").strip().lower()
            # Whole words only: "continue" is no wish to cancel.
            if answer in ("c", "cancel", "l", "leave", "w", "wait"):
                return answer[0]
    except (KeyboardInterrupt, EOFError):
        return "l"
