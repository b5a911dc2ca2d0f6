"""Whether the data are enough for what the recipe asks of them: one batch of each stage, and the gates' questions.

Counted from above: what validation takes out is not known yet. So who is refused here would have been refused later.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import count
from typing import Any

from nvila.components.contracts.recipe.evaluate import EvaluateSettings
from nvila.components.contracts.recipe.prune import JUDGED, PruneSettings
from nvila.components.contracts.recipe.quantize import QuantizeSettings
from nvila.components.contracts.recipe.train import Stage, TrainSettings
from nvila.components.contracts.steps import STAGES
from nvila.components.data.mixture import drawn, kept
from nvila.components.metrics.accuracy import fall_without_loss

COMPARED = 10_000
"""Records of a file, at most, that are held against each other: of more, pruning leaves enough for a batch."""
_OF_ITS_OWN = ("id", "image", "video")


@dataclass(frozen=True)
class Held:
    """What an annotation file holds."""

    records: int
    alike: Mapping[int, int] | None
    """How many records say just the same, by a digest of their texts and fields: whatever pruning groups by, these are
    in one group. None of more than `COMPARED`."""

    @classmethod
    def of(cls, records: list[Any]) -> Held:
        """What `layouts.read` found; what is no object will be in quarantine."""
        found = [record for record in records if isinstance(record, dict)]
        if len(found) > COMPARED:
            return cls(len(found), None)
        own = (sorted((key, value) for key, value in record.items() if key not in _OF_ITS_OWN) for record in found)
        return cls(len(found), Counter(hash(json.dumps(said)) for said in own))

    def kept(self, prune: PruneSettings, source: str) -> int:
        """The most that pruning leaves of them."""
        ratio = prune.keep_ratio_of.get(source, prune.keep_ratio)
        stays_whole = prune.method == "none" or (prune.method in JUDGED and prune.untrusted == "keep")
        if prune.method not in JUDGED and not prune.within and not stays_whole:
            return kept(ratio, self.records)
        if stays_whole or self.alike is None:
            return self.records
        # Of each group the ratio is rounded up, and a group is made of whole sets of records that say the same.
        return sum(kept(ratio, number) for number in self.alike.values())


def problems(
    train: TrainSettings,
    prune: PruneSettings,
    evaluate: EvaluateSettings,
    quantize: QuantizeSettings,
    held: Mapping[str, Held],
) -> list[str]:
    """What a stage or a gate would refuse for want of records.

    Args:
        train: the stages.
        prune: what they draw less by.
        evaluate: its sources and gate.
        quantize: its gate.
        held: by `source.split`; nothing is said of what is not known.
    """
    stages = zip(STAGES, train.stages, strict=False)
    found = [said for step, stage in stages if stage and (said := _unfilled(step, stage, train.gpus, prune, held))]
    for source, number, gates in _too_few(evaluate, quantize, held):
        least = max(gates.values())
        lower = f"lower {' and '.join(gates)} to {number}"
        if _in_vain(quantize, number):
            lower += f" and raise quantize.gate.max_loss to {_max_loss(number)}, as so few tell no smaller loss"
        found.append(
            f"data source {source}: {number} held-out questions are too few, {least} are asked for; bring "
            f"{least - number} more, or {lower}"
        )
    return found


def remarks(evaluate: EvaluateSettings, quantize: QuantizeSettings, held: Mapping[str, Held]) -> list[str]:
    """Of sources with enough questions for `least_questions`, which the gate after quantization refuses nevertheless
    where the quantized model answers all of them just as before."""
    few = {source for source, _, _ in _too_few(evaluate, quantize, held)}
    found = []
    for source, number in _questions(evaluate, held):
        asked = min(number, quantize.limit or number)
        if source not in few and _in_vain(quantize, asked):
            enough = next(n for n in count(asked) if not _in_vain(quantize, n))
            found.append(
                f"data source {source}: by {asked} held-out questions quantize.gate refuses even a model that loses "
                f"nothing; raise quantize.gate.max_loss to {_max_loss(asked)}, or ask {enough}"
            )
    return found


def _unfilled(step: str, stage: Stage, gpus: int, prune: PruneSettings, held: Mapping[str, Held]) -> str | None:
    if not all(subset in held and held[subset].records for subset in stage.data):  # which is told of elsewhere
        return None
    total, parts = 0, []
    for subset, passes in stage.data.items():
        source, _, split = subset.partition(".")
        pruned = stage.pruned and split == "sft"
        number = held[subset].kept(prune, source) if pruned else held[subset].records
        total += drawn(passes, number)
        parts.append(f"{passes:g} x {number} of {subset}{' after pruning' if number < held[subset].records else ''}")
    if total >= stage.batch:
        return None
    fitting = total - total % ((stage.micro_batch or 1) * gpus)
    lower = f"lower train.stages.{step}.batch to at most {fitting}, " if fitting else ""
    return (
        f"{step} ({stage.name}) draws {total} samples at most ({', '.join(parts)}), which do not fill one batch of "
        f"{stage.batch}: {lower}raise the passes in train.stages.{step}.data, or bring more records"
    )


def _questions(evaluate: EvaluateSettings, held: Mapping[str, Held]) -> Iterator[tuple[str, int]]:
    """How many each source is asked, where that is known."""
    for source in evaluate.sources:
        if here := held.get(f"{source}.heldout"):
            yield source, min(here.records, evaluate.limit or here.records)


def _too_few(
    evaluate: EvaluateSettings, quantize: QuantizeSettings, held: Mapping[str, Held]
) -> Iterator[tuple[str, int, dict[str, int]]]:
    """Sources that gates refuse, with the number of their questions, and what is asked by option."""
    asked = {
        "evaluate.gate.least_questions": evaluate.gate.least_questions,
        "quantize.gate.least_questions": quantize.gate.least_questions,
    }
    for source, number in _questions(evaluate, held):
        if number and (gates := {option: least for option, least in asked.items() if number < least}):
            yield source, number, gates


def _in_vain(quantize: QuantizeSettings, questions: int) -> bool:
    return fall_without_loss(questions) > quantize.gate.max_loss


def _max_loss(questions: int) -> float:
    return -(-fall_without_loss(questions) * 100 // 1) / 100
