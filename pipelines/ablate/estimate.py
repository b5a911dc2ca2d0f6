"""About how long the cases of an experiment take."""

from __future__ import annotations

from collections.abc import Mapping

from nvila.components.contracts.manifest import Manifest
from nvila.components.contracts.recipe.recipe import Recipe
from nvila.components.contracts.results.model import Validation
from nvila.components.contracts.steps import VALIDATE
from nvila.pipelines.ablate import passes, prepare
from nvila.pipelines.ablate.case import at_ratio, rows_of
from nvila.pipelines.ablate.cases import Case

CASE_SECONDS = 15.0
PICTURE_SECONDS, CLIP_SECONDS = 0.0019, 0.007
"""CPU seconds of a case, and of each sample that it trains on: measured with `tiny` on an AMD EPYC. Larger models take
longer, about in proportion to their parameters; finished cases of the same experiment tell better."""


def sizes_of(found: Mapping[str, Manifest]) -> dict[str, int]:
    """Samples by subset."""
    if VALIDATE not in found:
        return {}
    records = found[VALIDATE].told(Validation).records
    return {f"{source}.{split}": n for source, splits in records.items() for split, n in splits.items()}


def work_of(recipe: Recipe, case: Case, reference: float, sizes: Mapping[str, int]) -> tuple[dict[str, int], float]:
    """Steps by stage, and CPU seconds."""
    clips, stages = recipe.data.videos, prepare.pruned_stages(recipe)
    stay, half = at_ratio(sizes, case.ratio), at_ratio(sizes, reference)
    steps, seconds = dict[str, int](), CASE_SECONDS
    for name, row in rows_of(stages, case.schedule, sizes, stay, half).items():
        steps[name] = passes.steps_of(row, stay)
        for subset, times in row.data.items():
            rate = CLIP_SECONDS if subset.partition(".")[0] in clips else PICTURE_SECONDS
            seconds += rate * times * stay[subset]
    return steps, seconds
