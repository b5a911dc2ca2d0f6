"""Runs a compiled pipeline by its intermediate representation: an interpreter for tests, and no KFP.

It does what KFP's driver, launcher and Argo do with what our packages hold: every task starts when those before it have
ended well, the exit task whatever became of them; parameters and artifacts go from task to task; a container that fails
is followed by another. What it does not know it refuses. Where containers run is left to a `Place`.
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from graphlib import TopologicalSorter
from pathlib import Path
from typing import Any, Protocol

SUCCEEDED, FAILED, CANCELLED, SKIPPED = "SUCCEEDED", "FAILED", "CANCELLED", "SKIPPED"
AT_EXIT = "ALL_UPSTREAM_TASKS_COMPLETED"
_TASK = {"cachingOptions", "componentRef", "dependentTasks", "inputs", "retryPolicy", "taskInfo", "triggerPolicy"}
_TYPES = {"STRING": str, "NUMBER_INTEGER": int, "NUMBER_DOUBLE": int | float, "LIST": list, "STRUCT": dict}
_PLACEHOLDER = re.compile(r"\{\{\$\.inputs\.parameters\['([^']+)'\]\}\}")


@dataclass(frozen=True)
class Call:
    """One start of an executor: what KFP's driver has worked out for a pod."""

    task: str
    attempt: int
    container: dict[str, Any]
    """Image, command, arguments, environment and resources, with every value filled in."""
    kubernetes: dict[str, Any]
    """Its part of the platform's specification, likewise."""
    folder: Path
    """For what it puts out."""


class Place(Protocol):
    """Where containers run."""

    def start(self, call: Call) -> Callable[[], int]:
        """Start it; what comes back waits for its end and gives the exit code."""

    def stop(self) -> None:
        """End all that run as KFP's terminate does."""


@dataclass(frozen=True)
class Ended:
    """What became of a task, and what it has put out."""

    state: str
    parameters: Mapping[str, Any] = field(default_factory=dict)
    artifacts: Mapping[str, Any] = field(default_factory=dict)
    attempts: int = 0


@dataclass(frozen=True)
class _Scope:
    """What a task of a DAG can refer to: the DAG's own inputs, and the tasks before it."""

    parameters: Mapping[str, Any]
    tasks: dict[str, Future[Ended]] = field(default_factory=dict)

    def value(self, source: Mapping[str, Any]) -> Any:
        """Of an input; the keys are those of KFP's `TaskInputsSpec`."""
        ((kind, said),) = source.items()
        if kind == "runtimeValue":
            return said["constant"]
        if kind == "componentInputParameter":
            return self.parameters[said]
        producer = self.tasks[said["producerTask"]].result()
        if kind == "taskOutputParameter":
            return producer.parameters[said["outputParameterKey"]]
        if kind == "taskOutputArtifact":
            return producer.artifacts[said["outputArtifactKey"]]
        assert kind == "taskFinalStatus", f"{kind} is not known here"
        return {"state": producer.state, "pipelineTaskName": said["producerTask"], "error": {}}


class Interpreter:
    """One run of a package."""

    def __init__(
        self, package: tuple[dict[str, Any], dict[str, Any]], place: Place, root: Path, known: Mapping[str, Ended]
    ) -> None:
        """Args:
        package: the pipeline's specification and its platform part.
        root: for what tasks put out; containers find it at this path.
        known: tasks that are not run, as those which KFP takes out of its cache.
        """
        self._spec, platform = package
        self._kubernetes = platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"]
        self._place, self._root, self._known = place, root, known
        self._terminated, self._starting = False, threading.Lock()
        self.ended: dict[str, Ended] = {}
        """By task, of all DAGs."""

    def run(self, **arguments: Any) -> str:
        """The state in which the run ended, given fields of its form."""
        form = self._spec["root"]["inputDefinitions"]["parameters"]
        assert arguments.keys() <= form.keys(), arguments
        return self._dag(self._spec["root"], _filled_up(form, arguments)).state

    def terminate(self) -> None:
        """End what runs; nothing else starts, but the exit task."""
        with self._starting:
            self._terminated = True
            self._place.stop()

    def _dag(self, component: Mapping[str, Any], parameters: Mapping[str, Any]) -> Ended:
        tasks, scope = component["dag"]["tasks"], _Scope(parameters)
        assert component["dag"].keys() == {"tasks"}, "outputs of a DAG are not known here"
        order = TopologicalSorter({name: task.get("dependentTasks", []) for name, task in tasks.items()})
        with ThreadPoolExecutor(len(tasks)) as pool:  # a thread each: none waits for one that has not begun
            for name in order.static_order():
                scope.tasks[name] = pool.submit(self._task, name, tasks[name], scope)
        states = {task.result().state for task in scope.tasks.values()}
        return Ended(CANCELLED if self._terminated else FAILED if FAILED in states else SUCCEEDED)

    def _task(self, name: str, task: Mapping[str, Any], scope: _Scope) -> Ended:
        assert task.keys() <= _TASK, f"{name}: {task.keys() - _TASK} is not known here"
        at_exit = task.get("triggerPolicy", {}) == {"strategy": AT_EXIT}
        assert at_exit or "triggerPolicy" not in task, f"{name}: {task['triggerPolicy']} is not known here"
        before = [scope.tasks[other].result().state for other in task.get("dependentTasks", [])]
        if at_exit or all(state == SUCCEEDED for state in before):
            ended = self._known.get(name) or self._started(name, task, scope, at_exit)
        else:
            ended = Ended(SKIPPED)
        self.ended[name] = ended
        return ended

    def _started(self, name: str, task: Mapping[str, Any], scope: _Scope, at_exit: bool) -> Ended:
        component, inputs = self._spec["components"][task["componentRef"]["name"]], task.get("inputs", {})
        given = {key: scope.value(source) for key, source in inputs.get("parameters", {}).items()}
        artifacts = {key: scope.value(source) for key, source in inputs.get("artifacts", {}).items()}
        defined = component.get("inputDefinitions", {}).get("parameters", {})
        parameters = _filled(_filled_up(defined, given), given, scope)
        if "dag" in component:
            return self._dag(component, parameters)
        folder, puts_out = self._root / name, component.get("outputDefinitions", {})
        outputs = {
            "parameters": {key: {"outputFile": str(folder / key)} for key in puts_out.get("parameters", {})},
            "artifacts": {
                key: {"artifacts": [{"name": key, "type": kind["artifactType"], "uri": str(folder / key)}]}
                for key, kind in puts_out.get("artifacts", {}).items()
            },
            "outputFile": str(folder / "executor_output.json"),
        }
        read = {"parameterValues": parameters, "artifacts": {k: {"artifacts": [a]} for k, a in artifacts.items()}}
        text = json.dumps({"inputs": read, "outputs": outputs})
        label = component["executorLabel"]
        container = _filled(self._spec["deploymentSpec"]["executors"][label]["container"], given, scope)
        container["args"] = [text if part == "{{$}}" else part for part in container["args"]]
        kubernetes = _filled(self._kubernetes.get(label, {}), given, scope)
        for attempt in range(task.get("retryPolicy", {}).get("maxRetryCount", 0) + 1):
            with self._starting:
                if self._terminated and not at_exit:
                    return Ended(CANCELLED, attempts=attempt)
                wait = self._place.start(Call(name, attempt, container, kubernetes, folder))
            if wait() == 0:
                return Ended(SUCCEEDED, *_put_out(puts_out, outputs), attempt + 1)
        return Ended(CANCELLED if self._terminated and not at_exit else FAILED, attempts=attempt + 1)


def _filled_up(defined: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """With what a parameter holds where nothing is given."""
    return {key: one["defaultValue"] for key, one in defined.items() if "defaultValue" in one} | dict(given)


def _filled(value: Any, parameters: Mapping[str, Any], scope: _Scope) -> Any:
    """With values in place of placeholders and references, at any depth."""
    if isinstance(value, list):
        return [_filled(one, parameters, scope) for one in value]
    if isinstance(value, dict):
        if value and value.keys() <= {"runtimeValue", "componentInputParameter", "taskOutputParameter"}:
            return scope.value(value)
        return {key: _filled(one, parameters, scope) for key, one in value.items()}
    if not isinstance(value, str):
        return value
    text = _PLACEHOLDER.sub(lambda found: str(parameters[found[1]]), value)
    assert "{{$." not in text, f"{text} is not known here"
    return text


def _put_out(defined: Mapping[str, Any], outputs: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Parameters and artifacts that a container has left, of the types that its component says."""
    said = json.loads(Path(outputs["outputFile"]).read_text())
    parameters = said.get("parameterValues", {})
    for key, kind in defined.get("parameters", {}).items():
        assert isinstance(parameters[key], _TYPES[kind["parameterType"]]), f"{key}: {parameters[key]!r} is no {kind}"
    found = {}
    for key, entry in outputs["artifacts"].items():
        found[key] = entry["artifacts"][0] | said["artifacts"][key]["artifacts"][0]
        assert Path(found[key]["uri"]).exists(), f"{key}: nothing is there"
    return parameters, found
