"""The step `resolve` and the form it reads."""

import json
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
import yaml
from botocore.exceptions import ClientError
from google.protobuf import json_format
from google.protobuf.struct_pb2 import Struct

from nvila.components.contracts.environment import Environment
from nvila.components.contracts.errors import ConfigError, DataError
from nvila.components.contracts.keys import content_key
from nvila.components.contracts.pipelines import PIPELINES
from nvila.components.contracts.recipe import reader
from nvila.components.contracts.recipe.form import Form, fill_in
from nvila.components.contracts.recipe.reader import Document, document, shipped, shipped_document
from nvila.components.contracts.recipe.yaml12 import MOST_BYTES
from nvila.components.contracts.steps import STEPS
from nvila.components.resolve import step

TINY = shipped_document("tiny").text


def _error(**fields: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        fill_in(Form(**({"recipe": "tiny"} | fields)))
    return str(caught.value)


def test_empty_fields_keep_the_recipe() -> None:
    """The form's defaults must not overwrite what the recipe says."""
    assert fill_in(Form(recipe="tiny")) == fill_in(Form(recipe=TINY))
    assert fill_in(Form(recipe="tiny")).prune.keep_ratio == 0.5


def test_fields_and_overrides_are_laid_over_the_recipe() -> None:
    """A field of the form that has no effect would be a lie in the UI."""
    form = Form(
        recipe="tiny",
        model_name="mine",
        keep_ratio=0.25,
        target="none",
        overrides={"evaluate": {"limit": 70}},
    )
    recipe = fill_in(form)
    assert (recipe.register_.model_name, recipe.prune.keep_ratio) == ("mine", 0.25)
    assert (recipe.rollout.target, recipe.evaluate.limit) == ("none", 70)
    assert recipe.evaluate.sources == ["shapes", "digits", "clips"]


def test_a_share_that_nothing_is_pruned_to_is_refused() -> None:
    """Whoever asks for 30 per cent of the data would train on all of it, unawares."""
    off = {"prune": {"method": "none"}}
    assert fill_in(Form(recipe="tiny", overrides=off)).prune.method == "none"
    assert "keep_ratio: nothing is pruned: the method is none" in _error(keep_ratio=0.3, overrides=off)
    asked = {"prune": {"method": "none", "within": ["answer"], "small": None}}
    assert "prune.within: nothing is pruned" in _error(overrides=asked)
    nowhere = {"train": {"stages": {"train-4": {"pruned": None}, "train-5": {"pruned": None}}}}
    assert fill_in(Form(recipe="tiny", overrides=nowhere)).pruned_images is None
    asked = nowhere | {"prune": {"keep_ratio": 0.3}}
    assert "no stage has pruned: true" in _error(overrides=asked)


def test_data_uri_moves_every_source_and_builds_none() -> None:
    """Demonstration data must never be written into a user's folder."""
    sources = fill_in(Form(recipe="tiny", data_uri="/mnt/data/")).data.sources
    assert [source.path for source in sources] == [f"/mnt/data/{source.name}" for source in sources]
    assert {source.demo for source in sources} == {None}


@pytest.mark.parametrize("data", [None, "plates", {}, {"sources": None}])
def test_data_that_are_no_section_are_named(data: object) -> None:
    """The form's data_uri made a traceback of it."""
    assert "data" in _error(data_uri="/x", overrides={"data": {"sources": None}})
    content = yaml.safe_load(TINY) | {"data": data}
    assert "data" in _error(recipe=yaml.safe_dump(content), data_uri="/x")


def test_relative_paths_begin_at_the_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a pod the working directory belongs to the image: data would be looked for, and built, where nobody keeps."""
    overrides = {
        "data": {"sources": [{"name": "plates", "kind": "image", "path": "data/plates"}]},
        "model": {"base": {"vision_tower": "weights/tower", "llm": "hf://a/b@main"}},
        "prune": {"method": "deltaloss", "small": {"path": "/elsewhere/small"}, "large": {"path": "large@champion"}},
    }
    stages = {"train": {"stages": [s | {"data": {"plates.sft": 1}} for s in _stages()]}}
    evaluate = {"evaluate": {"sources": ["plates"], "gate": {"min_accuracy": {}}}}
    form = Form(recipe=_without_gate(), overrides=overrides | stages | evaluate)
    before = step.external(form.model_dump(), Environment.read())
    monkeypatch.setenv("NVILA_ROOT", "/volume")
    slices = step.run(form, {}, tmp_path, Environment.read()).result.slices
    assert slices["validate"]["data"]["sources"][0]["path"] == "/volume/data/plates"
    base = slices["initialize"]["model"]["base"]
    assert (base["vision_tower"], base["llm"]) == ("/volume/weights/tower", "hf://a/b@main")
    assert slices["prune-image"]["prune"]["small"]["path"] == "/elsewhere/small"
    assert slices["prune-image"]["prune"]["large"]["path"] == "large@champion"  # of the registry
    assert step.external(form.model_dump(), Environment.read()) != before, (
        "a cached result would hold the paths of another place"
    )


def test_more_stages_than_the_pipeline_has_are_refused(tmp_path: Path) -> None:
    """A sixth stage would be left out without a word."""
    overrides = {"train": {"stages": [*_stages(), _stages()[-1]]}}
    with pytest.raises(ConfigError, match="6 stages, and this pipeline has training steps for 5"):
        step.run(Form(recipe="tiny", overrides=overrides), {}, tmp_path, Environment.read())


def _stages() -> list[dict]:
    return yaml.safe_load(TINY)["train"]["stages"]


def _without_gate() -> str:
    content = yaml.safe_load(TINY)
    del content["evaluate"]["gate"]
    return yaml.safe_dump(content)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ({"train": {"percision": "bf16"}}, ["unknown recipe key train.percision", "Did you mean train.precision?"]),
        ({"modle": {}}, ["unknown recipe key modle", "Did you mean model?"]),
        ({"quantize": {"gate": {"max_los": 1}}}, ["quantize.gate.max_los", "quantize.gate.max_loss"]),
        ({"model": {"projector": "mlp_downsample_3x3_fix"}}, ["projector", "dynamic_s2", "cannot work together"]),
        ({"train": {"zero": 7}}, ["train.zero", "7"]),
        ({"evaluate": {"sources": ["pictures"]}}, ["evaluate.sources", "pictures", "shapes"]),
        ({"model": {"s2_scales": [28, 60]}}, ["s2_scales", "multiple"]),
    ],
)
def test_a_wrong_recipe_is_explained_in_one_line(override: dict, words: list[str]) -> None:
    """The message must name the dotted option and what to do; a pydantic dump helps nobody."""
    message = _error(overrides=override)
    assert all(word in message for word in words), message
    assert ("\n" in message) == ("mistakes" in message)


@pytest.mark.parametrize(
    ("fields", "word"),
    [
        ({"recipe": "tinny"}, "tiny"),
        ({"recipe": "a: [1,\nb"}, "YAML"),
        ({"recipe": "- 1\n- 2"}, "mapping"),
        ({"recipe": "a: " + "[" * 3000}, "deeply"),
    ],
)
def test_what_is_no_recipe_is_explained(fields: dict[str, str], word: str) -> None:
    """A typing error in the form must not end in a traceback."""
    message = _error(**fields)
    assert word in message and "\n" not in message


def test_a_form_of_one_line_takes_a_recipe() -> None:
    """KFP's form takes the line breaks out of a pasted YAML; what it does take is said, and works."""
    for pasted in (TINY.replace("\n", " "), TINY.replace("\n", ""), "name: mine data: {}"):
        assert "as JSON" in _error(recipe=pasted), pasted
    assert "as JSON" not in _error(recipe="a: [1,\nb")
    assert fill_in(Form(recipe=json.dumps(document(TINY).content))) == fill_in(Form(recipe="tiny"))


def test_whole_numbers_stay_whole() -> None:
    """KFP keeps overrides as a protobuf struct, whose numbers have all become floats: 200 questions were refused."""
    overrides = json_format.MessageToDict(json_format.ParseDict({"a": {"evaluate": {"limit": 200}}}, Struct()))["a"]
    assert isinstance(overrides["evaluate"]["limit"], float)
    assert fill_in(Form(recipe="tiny", overrides=overrides)).evaluate.limit == 200
    stages = {"train": {"stages": {"train-1": {"epochs": 2.0, "learning_rate": 0.5}}, "seed": 3.0}}
    assert json.dumps(Form(recipe="tiny", overrides=stages).overrides) == json.dumps(stages).replace(".0", "")


def test_a_recipe_lies_on_the_shared_volume(tmp_path: Path) -> None:
    """A field of the form takes one line; whoever edits the file and runs again must not get the old work."""
    here = Environment.read({"NVILA_ROOT": str(tmp_path)})
    folder = tmp_path / "teams" / "a"
    folder.mkdir(parents=True)
    (folder / "base.yaml").write_text("extends: tiny\nseed: 7\n")
    (folder / "mine.yaml").write_text("extends: base.yaml\nmodel: {base: {vision_tower: tower, llm: /abs/llm}}\n")
    keys = []
    for named in ("teams/a/mine.yaml", str(folder / "mine.yaml")):
        settings = Form(recipe=named)
        known, outcome = step.external(settings.model_dump(), here), step.run(settings, {}, tmp_path, here)
        made = outcome.result.recipe
        assert (made["name"], made["seed"]) == ("mine", 7) and outcome.read == known
        base = made["model"]["base"]
        assert (base["vision_tower"], base["llm"]) == (f"{folder}/tower", "/abs/llm")
        keys.append(known["recipe"])
    (folder / "base.yaml").write_text("extends: tiny\nseed: 8\n")
    assert len({*keys, step.external({"recipe": "teams/a/mine.yaml"}, here)["recipe"]}) == 2
    with pytest.raises(ConfigError, match="no such recipe file"):
        step.run(Form(recipe="teams/b/mine.yaml"), {}, tmp_path, here)


def test_a_recipe_lies_in_a_bucket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Read at its address, kept nowhere; what is not there ends with 2 and no traceback, and has a key of its own."""
    boto3 = pytest.importorskip("boto3")
    asked: list[dict[str, str]] = []
    objects = {"recipes/mine.yaml": b"extends: tiny\nseed: 9\n", "long.yaml": b"#" * (MOST_BYTES + 9)}

    class Client:
        def get_object(self, **named: str) -> dict[str, Any]:
            asked.append(named)
            if named["Key"] not in objects:
                raise ClientError({"Error": {"Code": "NoSuchKey", "Message": "none"}}, "GetObject")
            return {"Body": BytesIO(objects[named["Key"]])}

    monkeypatch.setattr(boto3, "client", lambda *args, **more: Client())
    here = Environment.read({"NVILA_ROOT": "/volume"})
    form = Form(recipe="s3://bucket/recipes/mine.yaml")
    outcome = step.run(form, {}, tmp_path, here)
    assert (outcome.result.recipe["name"], outcome.result.recipe["seed"]) == ("mine", 9)
    assert asked == [{"Bucket": "bucket", "Key": "recipes/mine.yaml"}]
    before = step.external(form.model_dump(), here)
    assert outcome.read == before
    objects["recipes/mine.yaml"] += b"# edited\n"
    assert step.external(form.model_dump(), here) != before
    with pytest.raises(DataError, match=r"s3://bucket/none.yaml: cannot be read from S3.*NoSuchKey"):
        step.run(Form(recipe="s3://bucket/none.yaml"), {}, tmp_path, here)
    assert step.external({"recipe": "s3://bucket/none.yaml"}, here)["recipe"]
    with pytest.raises(ConfigError, match="at most"):
        step.run(Form(recipe="s3://bucket/long.yaml"), {}, tmp_path, here)


def test_a_name_that_looks_like_a_date_is_a_name() -> None:
    """YAML makes a date of it, which the schema refuses and JSON cannot hold."""
    assert fill_in(Form(recipe=TINY.replace("name: tiny", "name: 2026-11-23"))).name == "2026-11-23"


def test_the_step_writes_a_slice_for_every_step(tmp_path: Path) -> None:
    """The outcome's values are what every other step and the report read."""
    outcome = step.run(Form(recipe="micro"), {}, tmp_path, Environment.read())
    assert outcome.result.recipe["register"]["model_name"] == "nvila-micro"
    assert outcome.result.slices["train-4"]["stage"]["pruned"] is True


def test_editing_the_evaluation_leaves_earlier_slices_alone(tmp_path: Path) -> None:
    """Otherwise a changed evaluation task would train everything anew."""
    before = step.run(Form(recipe="tiny"), {}, tmp_path, Environment.read()).result.slices
    after = step.run(
        Form(recipe="tiny", overrides={"evaluate": {"limit": 50}}), {}, tmp_path, Environment.read()
    ).result.slices
    assert {name for name in before if before[name] != after[name]} == {"preflight", "evaluate", "evaluate-quantized"}


@pytest.mark.parametrize("recipe", ["tiny", "extends: tiny\nname: mine", "extends: lite\nname: mine"])
def test_a_changed_shipped_recipe_changes_the_key(monkeypatch: pytest.MonkeyPatch, recipe: str) -> None:
    """On a cluster the settings hold only the recipe's name, or that of one that it extends: the text must count."""
    texts = {"tiny": TINY, "lite": "extends: tiny"}
    monkeypatch.setattr(reader, "shipped_document", lambda name, where=None: Document(name, texts[name]))

    def key() -> str:
        settings = Form(recipe=recipe).model_dump()
        return content_key("nvila.components.resolve.step", settings, {}, step.external(settings, Environment.read()))

    first = key()
    assert key() == first
    texts["tiny"] += "\n# edited\n"
    assert key() != first


def test_another_table_of_steps_cuts_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step that was added would find no slice of its own in the store, and a new setting would stay away."""

    def parts(**changed: object) -> object:
        steps = (*STEPS[:-2], replace(STEPS[-2], **changed), STEPS[-1])
        monkeypatch.setattr(step, "PIPELINES", {"lifecycle": replace(PIPELINES["lifecycle"], steps=steps)})
        return step.external({"recipe": "tiny"}, Environment.read())

    before = parts()
    assert parts(about="something else", remark="") == before
    assert parts(recipe={"rollout": "rollout", "seed": "seed"}) != before
    assert parts(hands_on="version") != before
    assert parts(name="another") != before


def test_shipped_names_are_not_paths() -> None:
    """A name with a slash must not read files outside the shipped recipes."""
    assert all("/" not in name for name in shipped())
    with pytest.raises(ConfigError):
        document("../recipes/tiny")
