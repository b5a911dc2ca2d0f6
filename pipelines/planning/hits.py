"""Which steps of a run are in the store already: the keys that the run would compute, without making or writing any."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from nvila.components.contracts.environment import current, entered
from nvila.components.contracts.errors import NvilaError, Unreachable
from nvila.components.contracts.manifest import Manifest
from nvila.components.contracts.recipe.form import Form, fill_in
from nvila.components.contracts.recipe.recipe import slices
from nvila.components.contracts.steps import REPORT, RESOLVE
from nvila.components.contracts.store import Store
from nvila.components.runner.execute import identity

Verdict = Literal["hit", "miss", "unknown", "always", "not asked for"]
"""`hit`: skipped. `miss`: nothing of it is there. `unknown`: its inputs are not there yet or do not answer, so neither
is its key. `always`: runs whatever is there. `not asked for`: the recipe leaves it out."""


def verdicts(form: Form, store: Path, runs: Path) -> dict[str, Verdict]:
    """By step, for a run on this machine with this store."""
    recipe = fill_in(form)
    settings: dict[str, Any] = slices(recipe) | {RESOLVE: form.model_dump(), REPORT: {}}
    found: dict[str, Verdict] = {}
    manifests: dict[str, Manifest] = {}
    # Where the steps of a run would look; the index of digests lies there too.
    with entered(current().model_copy(update={"store": store, "run": runs / "plan"})) as here:
        for row in recipe.pipeline.steps:
            inputs = {name: manifests[step] for name, step in row.inputs.items() if step in manifests}
            if row.always:
                found[row.name] = "always"
            elif settings[row.name] is None:
                found[row.name] = "not asked for"
                if row.hands_on in inputs:
                    manifests[row.name] = inputs[row.hands_on]
            elif len(inputs) < len(row.inputs):
                found[row.name] = "unknown"
            else:
                try:
                    key, _ = identity(here, row.name, row.module, settings[row.name], inputs)
                except Unreachable:  # which it has said; other steps can be told of
                    found[row.name] = "unknown"
                    continue
                except NvilaError:  # what it reads is not there (yet): demonstration data, say
                    found[row.name] = "miss"
                    continue
                manifest = Store(store).finished(row.name, key)
                found[row.name] = "hit" if manifest else "miss"
                if manifest:
                    manifests[row.name] = manifest
    return found
