"""What the controller applies: against the schemas of Kubernetes and of the Gateway API, and word by word where it
matters."""

from __future__ import annotations

import copy
import os
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from jsonschema import Draft202012Validator
from serving_pods import PLAIN, spec
from typer.core import TyperGroup
from typer.main import get_command

from nvila.components.contracts.exits import Exit
from nvila.components.contracts.modelrollout import MODEL_LABEL, ServingEndpoint, Spec
from nvila.components.contracts.recipe.endpoint import EndpointSettings
from nvila.components.serve import weights
from nvila.infra.controller.objects import (
    Owner,
    Platform,
    champion_name,
    champion_service,
    deployment,
    holds,
    label_of,
    name_of,
    route,
    service,
)
from nvila.infra.controller.pod import options
from nvila.infra.controller.seen import Registered
from nvila.pipelines import cli
from nvila.pipelines.commands.endpoint import settings_of

ROOT = Path(__file__).parents[3]
OWNER = Owner("eight-b", "team-a", "0d6e")
PLATFORM = Platform("nvila/controller:1", pull_secrets=("site",))
LONG = "a." + "x" * 250
VERSION = Registered("NVILA_8B.v2", "12", digest="d" * 64)
EVERYTHING: dict[str, Any] = {
    "model": "NVILA_8B.v2",
    "image": "nvila/serve:1",
    "gateway": {"name": "public", "namespace": "edge", "sectionName": "https"},
    "hostnames": ["models.example"],
    "pods": {
        "replicas": 3,
        "gpus": 2,
        "cpu": "0.5",
        "memory": "1024Mi",
        "nodeSelector": {"gpu": "h100"},
        "tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}],
        "affinity": {"nodeAffinity": {"preferredDuringSchedulingIgnoredDuringExecution": []}},
        "priorityClassName": "serving",
        "serviceAccountName": "server",
        "imagePullSecrets": ["own", "site"],
    },
    "endpoint": {"mediaDomains": ["a.example", "b.example"], "maxMediaSeconds": 1.5, "maxTokens": 64},
}


def every_object(owner: Owner, of: Spec) -> list[dict[str, Any]]:
    routes = [route(owner, of, *who) for who in (("", "", 0), ("1", "", 0), ("1", "2", 25), ("1", "2", 100))]
    return [deployment(owner, of, VERSION, PLATFORM), service(owner, "12"), champion_service(owner, ""), *routes]


@pytest.mark.parametrize("minor", range(29, 36))
def test_kubernetes_takes_what_is_applied(minor: int) -> None:
    """A field in the wrong place is dropped or refused, depending on the server, at the first promotion."""
    sys.path.append(str(ROOT / ".tools/python"))
    validate = pytest.importorskip("kubernetes_validate", reason="make tools").validate
    for content in (PLAIN, EVERYTHING):
        for owner in (OWNER, Owner(LONG, "n", "u")):
            for found in every_object(owner, spec(content))[:3]:
                validate(found, f"1.{minor}", strict=True)


def test_the_gateway_api_takes_the_routes() -> None:
    """A Gateway that refuses the route leaves all users without an answer."""
    folder = os.environ.get("NVILA_CRDS") or pytest.skip("NVILA_CRDS names no folder of custom resource definitions")
    text = Path(folder, "gateway.networking.k8s.io_httproutes.yaml").read_text(encoding="utf-8")
    versions = {one["name"]: one for one in yaml.load(text, yaml.CSafeLoader)["spec"]["versions"]}
    check = Draft202012Validator(_closed(versions["v1"]["schema"]["openAPIV3Schema"]))
    for content in (PLAIN, EVERYTHING):
        for found in every_object(OWNER, spec(content))[3:]:
            check.validate(found)
            broken = copy.deepcopy(found)
            broken["spec"]["rules"][0]["weight"] = 3
            assert not check.is_valid(broken)


def _closed(schema: Any) -> Any:
    """Refuses fields that it does not name, but of metadata."""
    if isinstance(schema, list):
        return [_closed(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    closed = {key: _closed(value) for key, value in schema.items()}
    return closed | ({"additionalProperties": False} if schema.get("properties") and "type" in schema else {})


def test_a_pod_is_what_was_agreed() -> None:
    """The endpoint would wait for a folder that nobody fills, or be asked at a port where it does not listen."""
    pod = deployment(OWNER, spec(EVERYTHING), VERSION, PLATFORM)["spec"]["template"]["spec"]
    (fetch,), (endpoint,) = pod["initContainers"], pod["containers"]
    assert fetch["command"] == [
        *("python", "-m", "nvila.components.serve.weights", "--model", "NVILA_8B.v2", "--version", "12"),
        *("--digest", "d" * 64, "--into", "/cache/served"),
    ]
    assert endpoint["command"] == [
        *("nvila", "serve", f"/cache/served/{'d' * 64}/model", "--foreground", "--host", "0.0.0.0", "--port", "8321"),
        *("--name", "NVILA_8B.v2", "--version", "12", "--metrics-port", "9321"),
        *("--fallback", "eight-b-champion.team-a.svc:8321", "--runs", "/tmp/runs"),
        *("--option", "max_tokens=64", "--option", "max_media_seconds=1.5"),
        *("--option", "media_domains=a.example,b.example"),
    ]
    assert endpoint["resources"]["limits"] == {"memory": "1024Mi", "nvidia.com/gpu": "2"}
    assert endpoint["resources"]["requests"] == {"memory": "1024Mi", "cpu": "0.5", "nvidia.com/gpu": "2"}
    assert "nvidia.com/gpu" not in fetch["resources"]["limits"], "a GPU that waits for weights serves nobody"
    assert [one["name"] for one in endpoint["env"]] == ["NVILA_API_KEY"]
    assert not any("KEY" in one["name"] and "NVILA" in one["name"] for one in fetch["env"])
    assert [one["name"] for one in pod["imagePullSecrets"]] == ["site", "own"]
    cache = {one["name"]: one.get("readOnly", False) for one in endpoint["volumeMounts"]}
    assert cache == {"cache": True, "shm": False, "tmp": False}


def test_a_pod_without_gpus_asks_for_none() -> None:
    """`nvidia.com/gpu: 0` is refused by some device plugins, and no node of a cluster without GPUs knows the name."""
    pod = deployment(OWNER, spec(), VERSION, PLATFORM)["spec"]["template"]["spec"]
    assert set(pod["containers"][0]["resources"]["limits"]) == {"memory"}
    assert not {"nodeSelector", "tolerations", "affinity", "priorityClassName", "serviceAccountName"} & set(pod)


domains = st.lists(st.from_regex(r"[a-z]{1,5}\.example", fullmatch=True), max_size=3)
settings = st.builds(
    ServingEndpoint,
    max_body_mib=st.integers(1, 1024),
    max_media_seconds=st.floats(0.1, 3600),
    request_seconds=st.floats(1, 86_400),
    media_domains=domains,
    origins=st.lists(st.sampled_from(["*", "https://a.example", "http://b.example:80"]), max_size=2),
    media_cache_mib=st.integers(0, 2**20),
)


@given(settings)
def test_the_pods_read_the_settings_that_people_gave(given_: ServingEndpoint) -> None:
    """A value that YAML reads as another one, or a comma in a list."""
    assert settings_of(options(given_)[1::2]) == EndpointSettings(**dict(given_))


names = st.from_regex(r"[a-z0-9]([-a-z0-9]{0,20}[a-z0-9])?(\.[a-z0-9]([-a-z0-9]{0,80}[a-z0-9])?){0,3}", fullmatch=True)
numbers = st.integers(1, 999_999_999).map(str)


@given(names, names, numbers, numbers)
def test_names_fit_and_tell_versions_apart(name: str, other: str, version: str, later: str) -> None:
    """Two models whose long names begin alike got each other's requests."""
    made = {
        text
        for one in {name, other}
        for owner in [Owner(one, "n", "u")]
        for text in (champion_name(owner), *(name_of(owner, number) for number in {version, later}))
    }
    assert len(made) == len({name, other}) * (1 + len({version, later}))
    assert all(re.fullmatch(r"[a-z]([-a-z0-9]{0,61}[a-z0-9])?", text) for text in made), made
    assert len({label_of(one) for one in {name, other}}) == len({name, other})
    assert all(re.fullmatch(r"[a-z0-9]([-a-z0-9.]{0,61}[a-z0-9])?", label_of(one)) for one in (name, other))


def test_a_short_name_stays_as_it_is() -> None:
    """People look for their model's name."""
    assert (name_of(OWNER, "7"), champion_name(OWNER)) == ("eight-b-v7", "eight-b-champion")
    assert service(OWNER, "7")["metadata"]["labels"][MODEL_LABEL] == "eight-b"


def backends(found: dict[str, Any]) -> dict[str, int]:
    return {one["name"]: one["weight"] for one in found["spec"]["rules"][-1]["backendRefs"]}


def pins(found: dict[str, Any]) -> dict[str, str]:
    return {
        rule["matches"][0]["headers"][0]["value"]: rule["backendRefs"][0]["name"]
        for rule in found["spec"]["rules"][:-1]
    }


@pytest.mark.parametrize(
    ("champion", "challenger", "weight", "shares", "named"),
    [
        ("", "", 0, {"eight-b-champion": 1}, ""),
        ("", "2", 0, {"eight-b-champion": 1}, ""),
        ("1", "", 0, {"eight-b-v1": 100}, "1"),
        ("1", "2", 0, {"eight-b-v1": 100}, "1"),
        ("1", "2", 25, {"eight-b-v1": 75, "eight-b-v2": 25}, "12"),
        ("1", "2", 100, {"eight-b-v2": 100}, "12"),
        ("", "2", 25, {"eight-b-v2": 25}, "2"),
    ],
)
def test_who_gets_which_requests(
    champion: str, challenger: str, weight: int, shares: dict[str, int], named: str
) -> None:
    """A backend of weight 0 among none is refused by some Gateways; a version at step 0 is nobody's to ask for."""
    found = route(OWNER, spec(), champion, challenger, weight)
    assert backends(found) == shares
    assert pins(found) == {version: f"eight-b-v{version}" for version in named}


def test_a_gateway_waits_longer_than_the_endpoint() -> None:
    """Envoy's own limit is 15 seconds: a long answer ended in the middle."""
    found = route(OWNER, spec(endpoint={"requestSeconds": 12.5}), "1", "", 0)
    assert {rule["timeouts"]["request"] for rule in found["spec"]["rules"]} == {"23s"}


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)


@given(json_values, st.text(min_size=5, max_size=6))
def test_what_others_add_changes_nothing_and_anything_else_does(wanted: Any, new: str) -> None:
    """Every round of the loop would apply everything anew, or never again."""
    assert holds(_with(wanted, new), wanted)
    if isinstance(wanted, dict) and wanted:
        name = next(iter(wanted))
        assert not holds({**wanted, name: [wanted[name], new]}, wanted)
        assert not holds({key: value for key, value in wanted.items() if key != name}, wanted)
    if isinstance(wanted, list):
        assert not holds([*wanted, new], wanted)


def _with(value: Any, new: str) -> Any:
    """With a default that the API server has filled in."""
    if isinstance(value, list):
        return [_with(one, new) for one in value]
    return {name: _with(one, new) for name, one in value.items()} | {new: 1} if isinstance(value, dict) else value


def test_quantities_are_compared_by_what_they_come_to() -> None:
    """The API server writes `0.5` as `500m` and `1024Mi` as `1Gi`: a loop would apply the Deployment for ever."""
    wanted = deployment(OWNER, spec(EVERYTHING), VERSION, PLATFORM)
    stored = copy.deepcopy(wanted)
    pod = stored["spec"]["template"]["spec"]
    for one in (*pod["initContainers"], *pod["containers"]):
        for part in one["resources"].values():
            part.update({name: {"0.5": "500m", "1024Mi": "1Gi"}.get(amount, amount) for name, amount in part.items()})
    assert stored != wanted and holds(stored, wanted)
    pod["containers"][0]["resources"]["limits"]["memory"] = "1G"
    assert not holds(stored, wanted)


def test_what_is_wanted_no_more_is_seen() -> None:
    """A node selector that people took away stayed: nothing in the object contradicts what is wanted."""
    before = deployment(OWNER, spec(EVERYTHING), VERSION, PLATFORM)
    pods = {**EVERYTHING["pods"], "nodeSelector": {}}
    assert not holds(before, deployment(OWNER, spec(EVERYTHING, pods=pods), VERSION, PLATFORM))
    assert holds(before, deployment(OWNER, spec(EVERYTHING), VERSION, PLATFORM))
    assert not holds(
        route(OWNER, spec(EVERYTHING), "1", "", 0), route(OWNER, spec(EVERYTHING, hostnames=[]), "1", "", 0)
    )


def test_both_programs_of_a_pod_read_their_commands(capsys: pytest.CaptureFixture[str]) -> None:
    """An option that is called otherwise by now ends every pod with a usage message."""
    nobody = Registered("m", "12", digest="none")
    pod = deployment(OWNER, spec(EVERYTHING), nobody, PLATFORM)["spec"]["template"]["spec"]
    command = pod["initContainers"][0]["command"]
    assert command[:3] == ["python", "-m", weights.__name__]
    assert weights.main(command[3:]) == Exit.USER and "not the digest of a manifest" in capsys.readouterr().err
    words = pod["containers"][0]["command"]
    program = get_command(cli.app)
    assert isinstance(program, TyperGroup) and words[:2] == ["nvila", "serve"]
    known = {name for one in program.commands["serve"].params for name in one.opts}
    assert {word for word in words if word.startswith("--")} <= known
