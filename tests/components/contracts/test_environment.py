"""The environment's object: what is read, what is refused, what is said, and that nothing shows a secret."""

from __future__ import annotations

import ast
import json
import os
import re
from pathlib import Path

import pytest

from nvila.components.contracts import environment
from nvila.components.contracts.environment import Environment, current, entered, for_child, handed_down, named, notices
from nvila.components.contracts.errors import ConfigError
from nvila.components.contracts.site import OLD_KEYS, Site

ROOT = Path(__file__).resolve().parents[3]
SITE = {"launcher": "a.module", "gpus_per_node": 4, "queue": "q"}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("NVILA_STORE", "s3://bucket/place"),
        ("PET_NODE_RANK", "first"),
        ("MASTER_PORT", None),
        ("NVILA_SITE", '{"gpus_per_node": "eight"}'),
        ("NVILA_SITE", '{"gpus": 8}'),
        ("NVILA_SITE", '{"node_memory": "lots"}'),
        ("NVILA_SITE", "{"),
        ("NVILA_GPUS_PER_NODE", "-1"),
    ],
)
def test_a_wrong_value_is_refused_by_the_variables_name(name: str, value: str | None) -> None:
    """A traceback of a number that is none names no variable; one that is not ours is nobody's business."""
    if value is None:
        assert Environment.read({name: "x"}) == Environment()
        return
    with pytest.raises(ConfigError, match=rf"^{name}: \w"):
        Environment.read({name: value})


def test_an_empty_variable_is_unset() -> None:
    """The chart's optional keys come empty; but an empty key must not open the endpoint."""
    variables = {"NVILA_STORE": "", "PET_NNODES": "", "NVILA_SITE": "", "NVILA_QUEUE": "", "HF_TOKEN": ""}
    assert Environment.read(variables) == Environment()
    with pytest.raises(ConfigError, match=r"^NVILA_API_KEY: "):
        Environment.read({"NVILA_API_KEY": ""})


@pytest.mark.parametrize("name", ["NVILA_API_KEY", "VLLM_API_KEY", "HF_TOKEN", "MLFLOW_TRACKING_TOKEN"])
@pytest.mark.parametrize(
    "value", ["two words", "line\nbreak", "behind\n", "tab\t", "schlüssel", "密钥", "\x7f", " ", "\udce4"]
)
def test_a_key_that_no_request_can_carry_is_refused(name: str, value: str) -> None:
    """The endpoint would ask for what no client can send, and each fails in a way of its own, some with the key."""
    with pytest.raises(ConfigError, match=f"^{name}: no key") as caught:
        Environment.read({name: value})
    assert value.strip() == "" or value not in str(caught.value)
    assert Environment.read({name: "a-Z_0.9~+/=:{}"})


def test_the_run_is_named_in_the_pod_only() -> None:
    """The compiled pipeline cannot know the id, and its folder would be called `$NVILA_RUN_ID`."""
    here = Environment.read({"NVILA_RUN": "/nvila/runs/$NVILA_RUN_ID", "NVILA_RUN_ID": "2b4c"})
    assert (here.run, here.on_cluster) == (Path("/nvila/runs/2b4c"), True)


def test_no_secret_is_shown() -> None:
    """An object that is handed on is printed sooner or later."""
    secret = "s3cr3t-Value"
    fields = Environment.model_fields
    hidden = {name for name, field in fields.items() if "SecretStr" in str(field.annotation) or not field.repr}
    found = Environment.read({str(fields[name].alias): secret for name in hidden})
    assert secret not in repr(found) and secret not in str(found)
    assert {"api_key", "webhook_url", "webhook_secret", "hub_token", "mlflow_tracking_uri"} <= hidden


def test_a_wrong_name_is_told_once_with_the_right_one() -> None:
    """A variable with a slip in its name is set in vain; Kubernetes' own names are no slips."""
    assert notices({"NVILA_CACH": "/x"}) == ["NVILA_CACH: nothing reads this variable; NVILA_CACHE is one"]
    services = {"NVILA_MLFLOW_SERVICE_HOST": "h", "NVILA_MLFLOW_PORT_5000_TCP_ADDR": "a", "NVILA_MLFLOW_PORT": "p"}
    assert notices(services | {"NVILA_CRDS": "/crds", "NVILA_STORE": "store"}) == []


def test_a_config_map_of_the_old_form_is_read_and_told() -> None:
    """A chart is upgraded after the pipeline as often as before it."""
    old = {"NVILA_SITE": "a.module", "NVILA_GPUS_PER_NODE": "4", "NVILA_QUEUE": "q", "NVILA_NODE_CPU": ""}
    new = {"NVILA_SITE": json.dumps(SITE)}
    assert Environment.read(old).site == Environment.read(new).site == Site.model_validate(SITE)
    assert notices(new) == []
    assert len(notices(old)) == 1 and "upgrade the chart" in notices(old)[0]
    assert set(OLD_KEYS.values()) < set(Site.model_fields)


def test_children_get_what_is_handed_down(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """torchrun's processes know only the variables; and a value that stays behind is the next step's."""
    monkeypatch.delenv("NVILA_PROGRESS_FILE", raising=False)
    monkeypatch.setenv("NVILA_STORE", "before")
    with entered(Environment.read()), handed_down(progress_file=tmp_path, store="after"):
        assert current().progress_file == tmp_path and for_child()["NVILA_STORE"] == "after"
    assert os.environ["NVILA_STORE"] == "before" and "NVILA_PROGRESS_FILE" not in os.environ
    child = for_child(named(run="r"), unless_set={"NVILA_STORE": "x", "A": "y"}, only=["NVILA_STORE"])
    assert child == {"A": "y", "NVILA_STORE": "before", "NVILA_RUN": "r"}


def test_no_other_module_names_a_variable() -> None:
    """A name that is written twice is renamed once."""
    found = []
    for path in [path for part in ("components", "pipelines", "infra") for path in (ROOT / part).rglob("*.py")]:
        nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
        said = {id(node.value) for node in nodes if isinstance(node, ast.Expr)}  # docstrings
        texts = [
            n.value for n in nodes if isinstance(n, ast.Constant) and isinstance(n.value, str) and id(n) not in said
        ]
        found += [path.name for text in texts if re.search(r"\bNVILA_[A-Z]", text)]
    assert set(found) == {"environment.py", "site.py"}


def test_few_places_ask_what_they_were_not_given() -> None:
    """What reads the environment below the entries can reach an output unseen: one more has to be argued for here."""
    asking = {
        "components/contracts/index.py",
        "components/contracts/progress.py",
        "components/data/remote/cache.py",
        "components/data/remote/hub.py",
        "components/serve/interpreter.py",
        "components/tracking/abandoned.py",
        "components/tracking/connect.py",
        "components/tracking/runs.py",
        "components/train/launch.py",
        "components/train/loop.py",
        "pipelines/ablate/experiment.py",
        "pipelines/ablate/plan.py",
        "pipelines/ablate/prepare.py",
        "pipelines/ablate/trials.py",
        "pipelines/ablate/work.py",
        "pipelines/commands/ui.py",
        "pipelines/commands/validate.py",
        "pipelines/planning/hits.py",
        "pipelines/planning/speed.py",
        "pipelines/show/results.py",
    }
    found = {
        path.relative_to(ROOT).as_posix()
        for part in ("components", "pipelines", "infra")
        for path in (ROOT / part).rglob("*.py")
        if re.search(r"\bcurrent\(\)", path.read_text(encoding="utf-8"))
        and path.name != Path(environment.__file__).name
    }
    assert found == asking
