"""Finds references of a compiled pipeline that lead nowhere: KFP's own loader accepts them, the cluster does not."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

_FOR_THE_DRIVER = re.compile(r"pipelinechannel--.*|(cpu|memory)_(request|limit)|accelerator_(type|count)")
"""Inputs of a task that its component does not declare: KFP's driver reads them to make the pod."""


def dangling_references(spec: Mapping[str, Any]) -> Iterator[str]:
    """Dangling references between tasks, inputs, outputs and components, one line each."""
    components = spec["components"]
    executors = spec["deploymentSpec"]["executors"]
    for name, component in {"root": spec["root"], **components}.items():
        if "executorLabel" in component and component["executorLabel"] not in executors:
            yield f"{name}: executor {component['executorLabel']}"
        for task_name, task in component.get("dag", {}).get("tasks", {}).items():
            for problem in _dangling_in_task(task, component, components):
                yield f"{name}/{task_name}: {problem}"


def _dangling_in_task(
    task: Mapping[str, Any], parent: Mapping[str, Any], components: Mapping[str, Any]
) -> Iterator[str]:
    siblings = parent["dag"]["tasks"]
    own = components.get(task["componentRef"]["name"])
    if own is None:
        yield f"component {task['componentRef']['name']}"
        return
    yield from (f"dependent task {name}" for name in task.get("dependentTasks", []) if name not in siblings)
    for group in ("parameters", "artifacts"):
        declared = own.get("inputDefinitions", {}).get(group, {})
        given = task.get("inputs", {}).get(group, {})
        yield from (
            f"{group}: {key} is not an input"
            for key in given
            if key not in declared and not _FOR_THE_DRIVER.fullmatch(key)
        )
        required = {
            key for key, value in declared.items() if not value.get("isOptional") and "defaultValue" not in value
        }
        yield from (f"{group}: {key} is not given" for key in sorted(required - set(given)))
        for key, source in given.items():
            if not _resolves(source, group, parent, siblings, components):
                yield f"{group}: {key} <- {source}"


def _resolves(
    source: Mapping[str, Any],
    group: str,
    parent: Mapping[str, Any],
    siblings: Mapping[str, Any],
    components: Mapping[str, Any],
) -> bool:
    """Whether what feeds an input exists: an input of the surrounding DAG, another task's output, or a constant."""
    for kind in ("componentInputParameter", "componentInputArtifact"):
        if kind in source:
            return source[kind] in parent.get("inputDefinitions", {}).get(group, {})
    for kind, key in (("taskOutputParameter", "outputParameterKey"), ("taskOutputArtifact", "outputArtifactKey")):
        if kind in source:
            producer = siblings.get(source[kind]["producerTask"])
            made = components.get(producer["componentRef"]["name"], {}) if producer else {}
            return source[kind][key] in made.get("outputDefinitions", {}).get(group, {})
    if "taskFinalStatus" in source:
        return source["taskFinalStatus"]["producerTask"] in siblings
    return "runtimeValue" in source
