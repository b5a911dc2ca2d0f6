"""What all cases share, made once: samples, the model before the pruned stages, score tables; clean and spoilt.

The clean part is steps of the pipeline under their own content keys: a run of the recipe has made them already, or need
not make them again.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import resource
import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nvila.components.contracts.children import die_with_parent, forking, how_ended
from nvila.components.contracts.environment import current, handed_down
from nvila.components.contracts.errors import ConfigError, NvilaError, from_record, to_record
from nvila.components.contracts.files import read_json, write_atomic
from nvila.components.contracts.manifest import MANIFEST, Manifest
from nvila.components.contracts.recipe.recipe import Recipe, slices
from nvila.components.contracts.steps import (
    INITIALIZE,
    PREFLIGHT,
    PRUNE_IMAGE,
    PRUNE_VIDEO,
    ROWS,
    STAGES,
    STEPS,
    VALIDATE,
)
from nvila.components.contracts.text import say
from nvila.components.preflight import step as preflight
from nvila.components.runner.execute import Place, identity, perform
from nvila.pipelines.ablate.case import SPOILT_STEP
from nvila.pipelines.ablate.cases import BASELINE

SPOILT_SHARE = 0.3
SPOILT = "spoilt "
"""Before the name of a step whose samples are spoilt."""
PRUNES = {"image": PRUNE_IMAGE, "video": PRUNE_VIDEO}
OURS = "nvila.pipelines.ablate."


@dataclass(frozen=True)
class Shared:
    """Manifests of what the cases start from, by step; those on spoilt samples under `SPOILT` and the step."""

    manifests: Mapping[str, Manifest]
    before: str
    """The step whose model the pruned stages start from."""

    def inputs(self, spoilt: bool) -> dict[str, Manifest]:
        """Of a case."""
        of = SPOILT if spoilt else ""
        tables = {name: self.manifests[of + step] for name, step in PRUNES.items()}
        scores = {f"scores_{name}": table for name, table in tables.items() if table.step == PRUNES[name]}
        samples = self.manifests[SPOILT_STEP if spoilt else VALIDATE]
        return {"model": self.manifests[self.before], "samples": samples, **scores}


def pruned_stages(recipe: Recipe) -> dict[str, Any]:
    """The rows of the stage table from the first pruned one on, by step.

    Raises:
        ConfigError: there is none, or one of them lies before a stage that is not.
    """
    rows = [(name, stage) for name, stage in zip(STAGES, recipe.train.stages, strict=False) if stage]
    first = next((place for place, (_, stage) in enumerate(rows) if stage.pruned), None)
    if first is None:
        raise ConfigError("no stage of the recipe is pruned", where="train.stages", do="Set `pruned: true` of one.")
    return dict(rows[first:])


def with_scores(recipe: Recipe, methods: tuple[str, ...]) -> Recipe:
    """The recipe whose prune step works out what every method needs."""
    asked = [method for method in methods if method != BASELINE]
    first = next(iter(asked), BASELINE)
    # None of its own choices is used: they are made anew for each case, as the composition is, which need not hold.
    update = {"method": first, "compare": asked[1:], "on_shift": "warn"}
    return recipe.model_copy(update={"prune": recipe.prune.model_copy(update=update)})


@dataclass(frozen=True)
class Part:
    """One piece of shared work."""

    name: str
    """Of its manifest in `Shared`."""
    step: str
    module: str
    settings: Mapping[str, Any] | None
    """None where the recipe leaves the step out."""
    inputs: Mapping[str, str]
    """Name of each input -> the part whose manifest it is."""
    hands_on: str = ""
    """The input that goes on in its place where it is left out."""


def prepare(recipe: Recipe, methods: tuple[str, ...], spoilt: bool, ledger: Path) -> Shared:
    """Make what is not there yet, each step in a process of its own.

    Args:
        recipe: of the experiment.
        methods: whose scores are needed.
        spoilt: whether the spoilt part is.
        ledger: file of what each step has cost, kept for a later call.

    Raises:
        NvilaError: what a step raised.
    """
    made = shared(recipe, make(recipe, _parts(recipe, methods, spoilt), ledger), spoilt)
    assert made is not None
    return made


def make(recipe: Recipe, parts: Sequence[Part], ledger: Path) -> dict[str, Manifest]:
    """Make those of the parts that are not there yet, and the demonstration data of the recipe."""
    done: dict[str, Manifest] = {}
    preflight.prepare(preflight.Settings.model_validate(slices(recipe)[PREFLIGHT]))
    for part in parts:
        inputs = {name: done[of] for name, of in part.inputs.items()}
        done[part.name] = inputs[part.hands_on] if part.settings is None else _do(part, inputs, ledger)
    return done


def look(recipe: Recipe, methods: tuple[str, ...], spoilt: bool) -> dict[str, Manifest]:
    """What is there already, in the store of this environment."""
    return there(_parts(recipe, methods, spoilt))


def there(parts: Sequence[Part]) -> dict[str, Manifest]:
    """Of these parts what is there already."""
    found: dict[str, Manifest] = {}
    here = current()
    for part in parts:
        inputs = {name: found[of] for name, of in part.inputs.items() if of in found}
        if len(inputs) < len(part.inputs):
            continue
        if part.settings is None:
            found[part.name] = inputs[part.hands_on]
            continue
        try:
            key, _ = identity(here, part.step, part.module, part.settings, inputs)
        except NvilaError:  # what it reads is not there, or does not answer
            continue
        if manifest := Place.of(here).store.finished(part.step, key):
            found[part.name] = manifest
    return found


def shared(recipe: Recipe, manifests: Mapping[str, Manifest], spoilt: bool) -> Shared | None:
    """What cases start from, where all of it is there."""
    there = all(name in manifests for name in names(recipe, spoilt))
    return Shared(manifests, _before(recipe)) if there else None


def names(recipe: Recipe, spoilt: bool) -> list[str]:
    """Of the parts."""
    return [part.name for part in _parts(recipe, (BASELINE,), spoilt)]


def _parts(recipe: Recipe, methods: tuple[str, ...], spoilt: bool) -> list[Part]:
    recipe = with_scores(recipe, methods)
    settings = slices(recipe)
    parts = steps_to(recipe, _before(recipe), *PRUNES.values())
    if spoilt:
        share = {"share": SPOILT_SHARE, "seed": recipe.seed}
        parts.append(Part(SPOILT_STEP, SPOILT_STEP, OURS + "spoil", share, {"samples": VALIDATE}))
        inputs = {"samples": SPOILT_STEP, "model": INITIALIZE}
        parts += [Part(SPOILT + n, n, ROWS[n].module, settings[n], inputs, ROWS[n].hands_on) for n in PRUNES.values()]
    return parts


def steps_to(recipe: Recipe, *names: str) -> list[Part]:
    """These steps of the pipeline and those that they rest on, in its order."""
    wanted, queue, settings = set[str](), [*names], slices(recipe)
    while queue:
        name = queue.pop()
        if name not in wanted:
            wanted.add(name)
            queue.extend(ROWS[name].inputs.values())
    return [
        Part(row.name, row.name, row.module, settings[row.name], row.inputs, row.hands_on)
        for row in STEPS
        if row.name in wanted
    ]


def _before(recipe: Recipe) -> str:
    first = next(iter(pruned_stages(recipe)))
    return ROWS[first].inputs["model"]


def _do(part: Part, inputs: Mapping[str, Manifest], ledger: Path) -> Manifest:
    """Perform a step in a fork: what it imports and starts ends with it."""
    say(f"{part.name}: ...")
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    arguments = (theirs, os.getpid(), part, inputs)
    process = context.Process(target=_perform, args=arguments)
    with forking():
        process.start()
    theirs.close()
    try:
        told: dict[str, Any] = ours.recv()
    except EOFError:
        process.join()
        what = f"{part.name} {how_ended(process.exitcode)}, and left no message"
        told = to_record(NvilaError(what, do="The same command goes on from here."))
    except BaseException:
        process.terminate()
        raise
    finally:
        process.join()
    if "error" in told:
        raise from_record(told)
    manifest = Manifest.load(Path(told["folder"], MANIFEST))
    known = read_json(ledger)
    if not told["cached"]:
        known[f"{part.step}/{manifest.key}"] = {
            "seconds": manifest.seconds,
            "cpu_seconds": round(told["cpu_seconds"], 1),
        }
        write_atomic(ledger, json.dumps(known, indent=1))
    say(f"{part.name}: {'was there' if told['cached'] else f'{manifest.seconds:.0f} s'}")
    return manifest


def _perform(pipe: Any, parent: int, part: Part, inputs: Mapping[str, Manifest]) -> None:
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)
    die_with_parent(parent)
    try:
        with handed_down(threads="1"):  # several that wait for each other cost more than they save on small models
            made, cached = perform(current(), part.step, part.module, part.settings or {}, inputs, tracked=False)
    except NvilaError as error:
        pipe.send(to_record(error))
        return
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    cpu = sum(one.ru_utime + one.ru_stime for one in used)
    pipe.send({"folder": made.folder, "cached": cached, "cpu_seconds": cpu})
