"""What may be said of pruning in a sentence: how many samples stay and by what, and if its references can be believed.

The same words in the report and on the model card.
"""

from __future__ import annotations

from nvila.components.contracts.results.model import Pruning

RANKED_BY = {
    "deltaloss": "ranked by DeltaLoss",
    "multimodal-gain": "ranked by multimodal gain",
    "clusters": "as many from each cluster of pictures",
    "random": "chosen at random",
}


def what_stays(pruning: Pruning) -> str:
    """`4,800 of 9,600 samples stay, ranked by DeltaLoss`; also where chance stood in for the recipe's method."""
    n, kept = (sum(getattr(of, name) for of in pruning.sources.values()) for name in ("n", "kept"))
    if kept == n:
        return f"All {n:,} samples stay" + (": nothing was pruned" if pruning.method == "none" else "")
    used = sorted({group.ranked_by for group in pruning.groups.values()} - {"none"}) or [pruning.method]
    words = how(used[0]) if len(used) == 1 else ", ".join(f"partly {how(method)}" for method in used)
    return f"{kept:,} of {n:,} samples stay, {words}"


def how(method: str) -> str:
    """A method in words."""
    return RANKED_BY.get(method, f"by {method}")


def believed(pruning: Pruning) -> str:
    """Whether the references can be believed, without a full stop; nothing where none was asked."""
    if not pruning.judged:
        return ""
    who = "The references" if pruning.method == "deltaloss" else "The reference"
    every, good = len(pruning.judged), sum(of.trusted for of in pruning.judged.values())
    if every == 1:
        return f"{who} {'can' if good else 'cannot'} be believed"
    if good in (0, every):
        return (
            f"{who} {'can be believed in each' if good else 'cannot be believed in any'} of {every} kinds of question"
        )
    return f"{who} can be believed in {good} of {every} kinds of question"
