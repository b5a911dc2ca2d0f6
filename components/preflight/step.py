"""The step `preflight`: refuses with one message before anything long starts. Skipped when nothing has changed."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from nvila.components.contracts.digests import file_sha256
from nvila.components.contracts.environment import Environment
from nvila.components.contracts.errors import DataError, PreflightError, Unreachable
from nvila.components.contracts.manifest import Manifest
from nvila.components.contracts.memory import available_bytes, gib
from nvila.components.contracts.recipe.data import DataSettings
from nvila.components.contracts.recipe.evaluate import EvaluateSettings
from nvila.components.contracts.recipe.prune import PruneSettings
from nvila.components.contracts.recipe.quantize import QuantizeSettings
from nvila.components.contracts.recipe.recipe import Needs
from nvila.components.contracts.recipe.rollout import TARGETS, RolloutSettings, Strategy
from nvila.components.contracts.recipe.section import Section, Weights
from nvila.components.contracts.recipe.train import TrainSettings
from nvila.components.contracts.results.run import Preflight
from nvila.components.contracts.step import Outcome
from nvila.components.data.demo import ensure
from nvila.components.data.layouts import read
from nvila.components.precision import backends
from nvila.components.preflight import checks, enough, locking, serving
from nvila.components.preflight.enough import Held
from nvila.components.runner.execute import Place
from nvila.components.serve import deployment
from nvila.components.serve.interpreter import memory_bytes, serve_python
from nvila.components.tracking.connect import is_shared


class Settings(Section):
    """The step's slice."""

    data: DataSettings
    rollout: RolloutSettings
    registered: str = ""
    """Name of the model in the registry."""
    needs: Needs
    vllm: bool
    """Whether a step of the recipe starts vLLM."""
    drawn: dict[str, dict[str, list[str]]] = {}
    """What draws samples, by source and split."""
    weights: list[str] = []
    """Where the recipe takes weights from: folders, `s3://`, `hf://`, and versions of the registry."""
    start: Weights | None = None
    """The whole model that training starts from."""
    train: TrainSettings | None = None
    prune: PruneSettings = PruneSettings()
    evaluate: EvaluateSettings | None = None
    quantize: QuantizeSettings = QuantizeSettings()


def prepare(settings: Settings) -> None:
    """Build the demonstration sources that are not there yet.

    Raises:
        ConfigError: something else lies where one should be.
    """
    for source in settings.data.sources:
        ensure(source)


def run(settings: Settings, inputs: Mapping[str, Manifest], out: Path, here: Environment) -> Outcome:
    """Tells which data files were found. Nothing is written.

    Raises:
        PreflightError: every problem that was found, in one message.
        Unreachable: MLflow or the place of weights does not answer, and nothing else is wrong.
    """
    refuse(_problems(settings, here))
    runs = here.run_folder.parent
    refuse(checks.weights_problems(settings.weights, runs))
    refuse(start_problems(settings, runs))
    return Outcome(
        kind="report",
        result=Preflight(annotations=_annotation_digests(settings.data)),
        measured={"memory_available_bytes": float(available_bytes())},
    )


def external(settings: Mapping[str, Any], here: Environment) -> dict[str, Any]:
    """What is wrong now, and digests of the annotation files: an unchanged and healthy machine is a cache hit."""
    parsed = Settings.model_validate(settings)
    return {"problems": _problems(parsed, here), "annotations": _annotation_digests(parsed.data)}


def _problems(settings: Settings, here: Environment) -> list[str]:
    place = Place.of(here)
    runs = place.run_dir.parent
    found = problems(settings, runs, place.store.root, on_cluster=here.on_cluster)
    if TARGETS[settings.rollout.target].in_pods:
        found += serving.problems(settings.registered, here)
    # A command does not wait for MLflow's import, where nobody else can have changed the store.
    return found + ([] if is_shared() else checks.tracking_problems(runs))


def problems(
    settings: Settings, runs: Path, store: Path, *, demo_can_be_built: bool = False, on_cluster: bool = False
) -> list[str]:
    """Everything that would stop the run, one line each.

    Args:
        settings: the slice.
        runs: folder of all runs; `serving/` in it tells which servers are ours.
        store: folder of finished work.
        demo_can_be_built: pass over demonstration sources that are not there yet.
        on_cluster: this process is a step's pod.
    """
    found = checks.python_problems()
    found += checks.disk_problems(settings.needs.disk_bytes, [store, runs])
    held: dict[str, Held] = {}
    found += checks.data_problems(settings.data.sources, settings.drawn, demo_can_be_built=demo_can_be_built, held=held)
    if settings.train and settings.evaluate:
        found += enough.problems(settings.train, settings.prune, settings.evaluate, settings.quantize, held)
    if is_shared():
        found += checks.tracking_problems(runs)
    # On a cluster every step has a pod, an image and memory of its own: this pod's say nothing about theirs.
    return found + (_pod_problems(settings, store) if on_cluster else _machine_problems(settings, runs))


def remarks(settings: Settings) -> list[str]:
    """What stops no run at its beginning, and likely at its end."""
    held: dict[str, Held] = {}
    for source in settings.data.sources:
        with suppress(DataError):  # `problems` tells of it
            if (path := source.annotation("heldout")).is_file():
                held[f"{source.name}.heldout"] = Held.of(read(path, source.layout_of("heldout")))
    return enough.remarks(settings.evaluate, settings.quantize, held) if settings.evaluate else []


def start_problems(settings: Settings, runs: Path) -> list[str]:
    """Why the model that training starts from cannot be trained as the stages say; none of a recipe that makes its own.

    Raises:
        Unreachable: its place does not answer.
    """
    if settings.start is None or settings.train is None:
        return []
    from nvila.components.preflight.start import problems as found

    return found(settings.start, filter(None, settings.train.stages), runs)


def _machine_problems(settings: Settings, runs: Path) -> list[str]:
    found = checks.memory_problems(settings.needs.memory_bytes)
    found += checks.package_problems()
    found += backends.problems(settings.train.run) if settings.train else []
    if TARGETS[settings.rollout.target].serves_here:
        found += port_problems(settings.rollout.host, settings.rollout.port, runs)
        found += room_problems(settings.rollout.strategy, runs)
    if settings.vllm:
        found += _serving_problems()
    return found


def port_problems(host: str, port: int, runs: Path) -> list[str]:
    """Whether no server can listen where the endpoint is wanted; our own endpoint of an earlier run may do so now."""
    reason = deployment.why_not(runs, host, port)
    said = f"rollout.host and rollout.port: {host}:{port} cannot be had ({reason}); choose another address"
    return [said] if reason else []


def room_problems(strategy: Strategy, runs: Path) -> list[str]:
    """Whether memory does not hold a new version beside the one that is served, which is taken to be as large."""
    status = deployment.running(runs)
    champion = status.of("champion") if status else None
    if strategy == "replace" or champion is None:
        return []
    served = champion.version
    needed, available = memory_bytes(Path(served.model_dir)), available_bytes()
    if needed <= available:
        return []
    return [
        f"rollout.strategy: a new version beside {served.name} version {served.version}, which is served, takes about "
        f"{gib(needed)} of memory, and {gib(available)} are available; free memory, or say `replace`: the old version "
        "is then stopped first, and nothing is served while the new one starts"
    ]


def _pod_problems(settings: Settings, store: Path) -> list[str]:
    target = settings.rollout.target
    found = locking.problems(store)
    if TARGETS[target].serves_here:
        found += [
            f"rollout.target: a server that the target {target} starts in a pod would end with the pod; give none"
        ]
    return found


def refuse(found: list[str]) -> None:
    """Raise the problems as one error, if there are any.

    Raises:
        Unreachable: all of them may pass.
        PreflightError: else.
    """
    if found:
        count = f"{len(found)} problems: " if len(found) > 1 else ""
        may_pass = all(isinstance(problem, checks.Away) for problem in found)
        raise (Unreachable if may_pass else PreflightError)(count + "; ".join(found))


def _serving_problems() -> list[str]:
    try:
        serve_python()
    except PreflightError as error:
        return [str(error)]
    return []


def _annotation_digests(data: DataSettings) -> dict[str, str]:
    paths = [(f"{source.name}/{path.name}", path) for source in data.sources for path in source.annotations().values()]
    return {label: file_sha256(path) for label, path in paths}
