"""What a step's pod asks of a cluster, and on which nodes it may run: one function of the recipe and the site."""

from __future__ import annotations

from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

from nvila.components.contracts.recipe.recipe import Recipe
from nvila.components.contracts.site import Site
from nvila.components.contracts.steps import RESOLVE, ROWS, STEPS, Step

ON_GPUS = ("gpu", "gpus", "node")
"""Sizes of steps that take GPUs where the site has them."""
_WHERE = ("tolerations", "node_labels")
"""Fields that say on which nodes."""
GPU_RESOURCE = "gpu_resource"
"""The output of `resolve` with the name under which the cluster counts GPUs."""


@dataclass(frozen=True)
class Placement:
    """Request and limit of a pod, as Kubernetes writes them, and where it may go."""

    cpu: str = "1"
    memory: str = "4Gi"
    gpus: str = "0"
    """A text: KFP's driver takes a number for an empty text, so for no GPU."""
    tolerations: list[dict[str, Any]] = field(default_factory=list)
    node_labels: dict[str, str] = field(default_factory=dict)


def pod(row: Step, recipe: Recipe, site: Site) -> Placement:
    """Of the step's own pod; where a job does the work, it only starts and watches the job."""
    return _without_gpus(site) if row.job and site.launcher else work(row, recipe, site)


def work(row: Step, recipe: Recipe, site: Site) -> Placement:
    """Of the work, wherever it is done; what does not fit one node fills it."""
    pruning = recipe.prune.processes if recipe.train.pruned else 0
    processes = min({"gpu": 1, "gpus": pruning, "node": recipe.train.gpus}.get(row.size, 0), site.gpus_per_node)
    if site.gpus_per_node == 0 or row.size == "small" or (row.size == "gpus" and not processes):
        return _without_gpus(site)
    if processes:
        cpu, memory = share(site, processes)
        return Placement(cpu, memory, str(processes), list(site.tolerations), dict(site.gpu_labels))
    if _has_little_to_do(row, recipe):
        return _without_gpus(site)
    cores, gib = {"cpus": (16, 64), "memory": (8, 128)}[row.size]
    node_cores, node_bytes = _node(site)
    return _without_gpus(site, *_written(min(Fraction(cores), node_cores), min(Fraction(gib << 30), node_bytes)))


def _without_gpus(site: Site, *asked: str) -> Placement:
    """On the nodes for such pods; where nothing is `asked`, as little as a pod takes."""
    where = {"tolerations": list(site.cpu_tolerations), "node_labels": dict(site.cpu_labels)}
    return Placement(*asked, **where)  # type: ignore[arg-type]


def _has_little_to_do(row: Step, recipe: Recipe) -> bool:
    """The weights that a recipe makes itself are small, and so are demonstrations."""
    if row.size == "memory":
        return recipe.model.base.made_here
    return row.size == "cpus" and all(source.demo for source in recipe.data.sources)


def sources() -> dict[str, dict[str, str]]:
    """By step: for each field of its placement the output of `resolve` that says it. That step itself has none, nor the
    last one, which KFP gives nothing of other steps.

    KFP takes no field out of a parameter, so each is one of its own; steps of one size share theirs.
    """
    return {
        row.name: {part: f"{_shared_by(row, part)}_{part}" for part in _parts(row)}
        for row in STEPS
        if row.name != RESOLVE and not row.at_exit
    }


def parameters(recipe: Recipe, site: Site) -> dict[str, Any]:
    """What `resolve` says, in the order of its outputs: `GPU_RESOURCE`, and everything that `sources` names."""
    found: dict[str, Any] = {GPU_RESOURCE: site.gpu_resource}
    for step, names in sources().items():
        wanted = pod(ROWS[step], recipe, site)
        found |= {name: getattr(wanted, part) for part, name in names.items()}
    return found


def share(site: Site, processes: int) -> tuple[str, str]:
    """CPUs and memory that belong to so many GPUs of a node."""
    part = Fraction(processes, site.gpus_per_node)
    return _written(*(whole * part for whole in _node(site)))


def _written(cores: Fraction, size: Fraction) -> tuple[str, str]:
    return f"{int(cores * 1000)}m", f"{int(size) >> 20}Mi"


def _node(site: Site) -> tuple[Fraction, Fraction]:
    """Cores and bytes of a whole node."""
    from kubernetes.utils.quantity import parse_quantity

    return Fraction(parse_quantity(site.node_cpu)), Fraction(parse_quantity(site.node_memory))


def _shared_by(row: Step, part: str) -> str:
    if row.size not in ON_GPUS and part in _WHERE:
        return "plain"
    return f"{row.size}_job" if row.job else row.size


def _parts(row: Step) -> tuple[str, ...]:
    """A small pod asks for the same on every site."""
    asked = () if row.size == "small" else ("cpu", "memory", "gpus") if row.size in ON_GPUS else ("cpu", "memory")
    return (*asked, *_WHERE)
