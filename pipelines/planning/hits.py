"""Which steps of a run are in the store already: the keys that the run would compute, without making or writing any."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

from nvila.components.contracts.environment import Environment, current, entered
from nvila.components.contracts.errors import NvilaError, Unreachable
from nvila.components.contracts.keys import content_key
from nvila.components.contracts.manifest import Manifest
from nvila.components.contracts.recipe.reader import Form, fill_in
from nvila.components.contracts.recipe.recipe import slices
from nvila.components.contracts.step import call
from nvila.components.contracts.store import Store
from nvila.components.runner.execute import ALWAYS
from nvila.pipelines.steps import STEPS

Verdict = Literal["hit", "miss", "unknown", "always"]
"""`hit`: skipped. `miss`: nothing of it is there. `unknown`: its inputs are not there yet or do not answer, so neither
is its key. `always`: runs whatever is there."""


@dataclass(frozen=True)
class Node:
    """A step as the compiled pipeline has it."""

    module: str
    inputs: dict[str, str]
    """Name of each input -> the step that makes it."""


def verdicts(form: Form, store: Path, runs: Path) -> dict[str, Verdict]:
    """By step, for a run on this machine with this store."""
    settings: dict[str, Any] = slices(fill_in(form)) | {"resolve": form.model_dump(), "report": {}}
    found: dict[str, Verdict] = {}
    manifests: dict[str, Manifest] = {}
    # Where the steps of a run would look; the index of digests lies there too.
    with entered(current().model_copy(update={"store": store, "run": runs / "plan"})) as here:
        for step, node in nodes().items():
            if step in ALWAYS:
                found[step] = "always"
            elif any(source not in manifests for source in node.inputs.values()):
                found[step] = "unknown"
            else:
                inputs = {name: manifests[source] for name, source in node.inputs.items()}
                try:
                    manifest = _finished(here, Store(store), step, node.module, settings[step], inputs)
                except Unreachable:  # which it has said; other steps can be told of
                    found[step] = "unknown"
                    continue
                found[step] = "hit" if manifest else "miss"
                if manifest:
                    manifests[step] = manifest
    return found


def nodes() -> dict[str, Node]:
    """Every step in the order of the DAG, from the pipeline itself."""
    from google.protobuf.json_format import MessageToDict

    from nvila.pipelines.lifecycle import build

    spec = MessageToDict(build().pipeline_spec)
    tasks = {
        name: task
        for dag in (spec["root"], *spec["components"].values())
        for name, task in dag.get("dag", {}).get("tasks", {}).items()
    }
    found = {}
    for step in STEPS:
        executor = spec["components"][tasks[step]["componentRef"]["name"]]["executorLabel"]
        source = "".join(spec["deploymentSpec"]["executors"][executor]["container"]["command"])
        named = re.search(r'execute\(step, "(nvila\.[\w.]+)"', source)
        assert named, f"the wrapper of {step} names no step module"
        artifacts = tasks[step].get("inputs", {}).get("artifacts", {})
        found[step] = Node(
            named[1],
            {
                _input_name(key): source["taskOutputArtifact"]["producerTask"]
                for key, source in artifacts.items()
                if key != "slices"
            },
        )
    return found


def _input_name(artifact: str) -> str:
    """Inputs that are called after a step have its name, which is no Python name: `train_1` is `train-1`."""
    name = artifact.replace("_", "-")
    return name if name in STEPS else artifact


def _finished(
    here: Environment,
    store: Store,
    step: str,
    module: str,
    settings: Mapping[str, Any],
    inputs: Mapping[str, Manifest],
) -> Manifest | None:
    code = import_module(module)
    try:
        external = call(code.external, settings, here=here) if hasattr(code, "external") else None
    except Unreachable:
        raise
    except NvilaError:  # what it reads is not there (yet): demonstration data, say
        return None
    key = content_key(module, {"step": step, **settings}, {n: m.digest for n, m in inputs.items()}, external)
    return store.finished(step, key)
