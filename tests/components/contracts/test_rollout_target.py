"""What a recipe may say of its rollout with the target `kubernetes`, and what a site of its serving."""

from __future__ import annotations

import json
from typing import Any

import pytest

from nvila.components.contracts.errors import ConfigError
from nvila.components.contracts.recipe.form import Form, fill_in
from nvila.components.contracts.recipe.recipe import Recipe
from nvila.components.contracts.recipe.rollout import RolloutSettings
from nvila.components.contracts.serving import served_with
from nvila.components.contracts.site import Site


def recipe(**rollout: Any) -> Recipe:
    return fill_in(Form(recipe="tiny", overrides={"rollout": {"target": "kubernetes"} | rollout}))


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ("host", {"host": "0.0.0.0"}),
        ("port", {"port": 8322}),
        ("strategy", {"strategy": "replace"}),
        ("policy.pinned_prompts", {"policy": {"pinned_prompts": 65}}),
        ("endpoint.certificate", {"endpoint": {"certificate": "a.pem", "certificate_key": "b.pem"}}),
        ("endpoint.media_folders", {"endpoint": {"media_folders": ["/data"]}}),
        ("endpoint.adapters", {"endpoint": {"adapters": {"mine": "/data/lora"}}}),
    ],
)
def test_what_pods_cannot_do_is_refused(option: str, said: dict[str, Any]) -> None:
    """A recipe that says so and is taken would be served in another way than it says."""
    with pytest.raises(ConfigError, match=rf"rollout\.{option}: .*(leave it out|at most 64)"):
        recipe(**said)


def test_the_policy_is_that_of_pods_where_the_recipe_does_not_say() -> None:
    """300 seconds are gone before a node has pulled the image; what is said stays, whatever the target."""
    unsaid, said = recipe().rollout.policy, recipe(policy={"steps": [50], "deadline_seconds": 60}).rollout.policy
    assert (unsaid.steps, unsaid.deadline_seconds) == ([5, 25, 50, 100], 1800)
    assert (said.steps, said.deadline_seconds, said.min_requests) == ([50], 60, unsaid.min_requests)
    assert RolloutSettings().policy.steps == [10, 50]
    again = RolloutSettings.model_validate(recipe().rollout.model_dump())
    assert again == recipe().rollout


@pytest.mark.parametrize(
    ("serving", "said"),
    [
        ({"image": "i"}, "serving.gateway"),
        ({"image": "", "gateway": {"name": "g"}}, "serving.image"),
        ({"image": "i", "gateway": {"name": "g"}, "pods": {"replicas": 0}}, "serving.pods.replicas"),
        ({"image": "i", "gateway": {"name": "g"}, "pods": {"memory": "much"}}, "serving.pods.memory"),
        ({"image": "i", "gateway": {"name": "g", "listener": "h"}}, "serving.gateway.listener"),
    ],
)
def test_a_site_that_cannot_serve_says_where(serving: dict[str, Any], said: str) -> None:
    """A slip in the chart's values must name itself where it is read first, not be a ModelRollout that is refused."""
    with pytest.raises(ConfigError, match=f"NVILA_SITE: {said}"):
        served_with(Site.read({"NVILA_SITE": json.dumps({"serving": serving})}))
