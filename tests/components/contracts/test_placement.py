"""What pods ask for: of which recipe, on which site."""

from __future__ import annotations

from typing import Any

import pytest

from nvila.components.contracts.placement import Placement, parameters, pod, work
from nvila.components.contracts.recipe.form import Form, fill_in
from nvila.components.contracts.recipe.recipe import Recipe
from nvila.components.contracts.site import Site
from nvila.components.contracts.steps import ROWS

TAINT = {"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}
SITE = Site(gpu_labels={"pool": "h100"}, tolerations=(TAINT,))


def recipe(name: str = "nvila-8b", **overrides: Any) -> Recipe:
    return fill_in(Form(recipe=name, overrides=overrides))


def test_the_pod_of_a_job_is_small_and_needs_no_gpu_node() -> None:
    """A launcher that holds 8 GPUs while its job waits for them blocks itself."""
    jobs = SITE.model_copy(update={"launcher": "a.launcher"})
    small = {step: pod(ROWS[step], recipe(), jobs) == Placement() for step in ("train-1", "prune-image", "evaluate")}
    assert all(small.values()), small
    assert pod(ROWS["train-1"], recipe(), SITE).gpus == "8"
    assert pod(ROWS["quantize"], recipe(), jobs).gpus == "1", "no job does this"


def test_pods_without_gpus_go_where_the_site_says() -> None:
    """On a cluster whose nodes are all tainted for teams, the small steps waited for ever."""
    team = {"key": "team", "operator": "Exists"}
    site = SITE.model_copy(update={"cpu_labels": {"pool": "cpu"}, "cpu_tolerations": (team,), "launcher": "a.launcher"})
    for step in ("preflight", "initialize", "evaluate", "train-1"):
        found = pod(ROWS[step], recipe(), site)
        assert (found.tolerations, found.node_labels) == ([team], {"pool": "cpu"}), step
    assert pod(ROWS["quantize"], recipe(), site).node_labels == {"pool": "h100"}


def test_pods_with_gpus_go_to_nodes_with_gpus() -> None:
    """Without a toleration they wait for ever before a tainted node; without labels they take the wrong GPUs."""
    found = work(ROWS["quantize"], recipe(), SITE)
    assert (found.cpu, found.memory, found.gpus) == ("12000m", "153600Mi", "1")
    assert (found.tolerations, found.node_labels) == ([TAINT], {"pool": "h100"})
    assert not work(ROWS["initialize"], recipe(), SITE).tolerations


@pytest.mark.parametrize(("gpus", "asked"), [(2, "2"), (8, "8"), (16, "8")])
def test_a_stage_asks_for_the_gpus_of_its_recipe(gpus: int, asked: str) -> None:
    """Two processes that hold a whole node keep six GPUs idle."""
    found = work(ROWS["train-1"], recipe(train={"gpus": gpus}), SITE)
    assert found.gpus == asked and found.cpu == f"{12000 * int(asked)}m"


@pytest.mark.parametrize(("prune", "asked"), [({}, "1"), ({"gpus": 4}, "4"), ({"gpus": 16}, "8")])
def test_pruning_asks_for_the_gpus_of_its_recipe(prune: dict[str, int], asked: str) -> None:
    """Shards would be scored on one GPU, whatever the recipe says; or a GPU waits for a choice by chance."""
    assert work(ROWS["prune-image"], recipe(prune=prune), SITE).gpus == asked
    assert work(ROWS["prune-image"], recipe("tiny"), SITE) == Placement()


def test_a_site_without_gpus_is_asked_for_none() -> None:
    """A pod that asks for what no node has waits for ever."""
    assert {value for name, value in parameters(recipe("tiny"), Site(gpus_per_node=0)).items() if "_gpus" in name} == {
        "0"
    }


def test_what_a_recipe_makes_itself_needs_little() -> None:
    """128 GiB for weights of 2 MiB: the pod of a first try found no node."""
    for step in ("initialize", "validate"):
        assert work(ROWS[step], recipe("micro"), SITE) == work(ROWS[step], recipe("tiny"), SITE) == Placement()
    own = fill_in(Form(recipe="tiny", data_uri="/nvila/mine"))
    assert work(ROWS["validate"], own, SITE).cpu == work(ROWS["validate"], recipe(), SITE).cpu == "16000m"
    assert work(ROWS["initialize"], recipe(), SITE).memory == "131072Mi"
    assert work(ROWS["initialize"], recipe(), Site(node_memory="64G", node_cpu="500m")).memory == "61035Mi"
