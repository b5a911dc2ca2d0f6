from __future__ import annotations

import base64
import io
import json
import sys
import types
from hashlib import sha256
from pathlib import Path

import pandas
import pytest
import torch
from telling import evaluation, judged, pruned, quantization, quantized_evaluation, retained, scored, training

from nvila.components.contracts.addresses import file_path, sqlite_url
from nvila.components.contracts.environment import Environment
from nvila.components.contracts.errors import DamagedError, DataError
from nvila.components.contracts.manifest import InputRef, Kind, Manifest
from nvila.components.contracts.results.model import Pruning
from nvila.components.contracts.results.result import Result
from nvila.components.contracts.results.run import Registration
from nvila.components.data.sampling import Sampling
from nvila.components.register import pinned
from nvila.components.register.card import model_card
from nvila.components.register.step import Settings, run
from nvila.components.tracking.connect import connected
from nvila.components.tracking.registry import PINNED_TAG, find, registered_inputs

SETTINGS = Settings.model_validate({"register": {"model_name": "small"}})


def manifest(root: Path, step: str, kind: Kind, result: Result, **inputs: Manifest) -> Manifest:
    folder = root / "store" / step / "0"
    folder.mkdir(parents=True)
    refs = {n: InputRef(step=m.step, uri=f"{m.folder}/manifest.json", digest=m.digest) for n, m in inputs.items()}
    made = Manifest(step=step, key="0" * 64, kind=kind, result=result, inputs=refs, folder=str(folder))
    made.save(folder / "manifest.json")
    return made


@pytest.fixture
def runs(tracked_run: Path) -> Path:
    return tracked_run.parent


def test_register_twice_is_one_version_with_card_and_lineage_and_no_alias(
    runs: Path, tmp_path: Path, register_inputs: dict[str, Manifest]
) -> None:
    """A repeated step must not fill the registry with copies; an alias would have a cluster serve what no run asks it
    to."""
    out = tmp_path / "out"
    out.mkdir()
    first = run(SETTINGS, register_inputs, out, Environment.read())
    second = run(SETTINGS, register_inputs, out, Environment.read())
    assert first.result == second.result == Registration(name="small", version="1", model_uri="models:/small/1")
    version = find(runs, "small", "1")
    assert version is not None and version.aliases == ()
    assert version.tags["nvila.digest"] == register_inputs["model"].digest
    assert {ref.digest for ref in registered_inputs(version)} == {m.digest for m in register_inputs.values()}
    with connected(runs) as client:
        made = client.get_model_version("small", "1")
        logged = client.get_logged_model(made.tags["nvila.logged_model"])
        source = client.get_run(made.run_id).data.tags
        parent = client.get_run(source["mlflow.parentRunId"])
        history = {m.key: m for m in logged.metrics}
    assert (source["nvila.step"], parent.info.run_name, logged.source_run_id) == ("register", "r1", made.run_id)
    assert "**Learnt: every source is above its baseline" in made.description
    assert "- W4A16: 21 linear layers" in made.description
    assert "| digits | 4000 | 1000 |" in made.description
    assert "| digits | 1000 | 0.110 | 0.300 (0.280 to 0.320), blank picture |" in made.description
    assert history["evaluate-quantized/accuracy/digits/accuracy"].value == 0.71
    assert history["evaluate-quantized/accuracy/digits/accuracy"].dataset_name == "validate"
    place = file_path(logged.artifact_location)
    stored = {p.relative_to(place).as_posix() for p in place.rglob("*") if p.is_file()}
    wanted = {"MLmodel", "manifest.json", "pinned.jsonl", "model/config.json", "model/model.safetensors"}
    assert wanted <= stored
    assert not any(p.is_symlink() for p in place.rglob("*"))
    assert not (out / "upload").exists()


def kept(runs: Path) -> tuple[bytes, str]:
    """The pinned prompts of version 1 as its logged model has them, and the tag."""
    with connected(runs) as client:
        made = client.get_model_version("small", "1")
        place = file_path(client.get_logged_model(made.tags["nvila.logged_model"]).artifact_location)
    return Path(place, "pinned.jsonl").read_bytes(), made.tags[PINNED_TAG]


def test_a_version_brings_its_pinned_prompts_along(
    runs: Path, tmp_path: Path, register_inputs: dict[str, Manifest], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A cluster has neither the data nor the evaluation: it could not tell whether a version answers as it did."""
    run(SETTINGS, register_inputs, tmp_path, Environment.read())
    content, tag = kept(runs)
    assert sha256(content).hexdigest() == tag
    lines = [json.loads(line) for line in content.splitlines()]
    assert {line["id"] for line in lines} == {f"digits/heldout/{i}" for i in range(3)}
    by_id = {line["id"]: line for line in lines}
    assert (by_id["digits/heldout/1"]["expected"], by_id["digits/heldout/1"]["answer"]) == ("7", "1")
    for line in lines:
        assert {"model": "small", "max_tokens": 8, "temperature": 0, "logprobs": True}.items() <= line["body"].items()
        (message,) = line["body"]["messages"]
        (medium,) = [part["image_url"]["url"] for part in message["content"] if part["type"] == "image_url"]
        number = line["id"].rpartition("/")[2]
        assert base64.b64decode(medium.partition(",")[2]) == (tmp_path / f"{number}.png").read_bytes()

    run(SETTINGS, register_inputs, tmp_path, Environment.read())
    assert kept(runs) == (content, tag)
    monkeypatch.setattr(pinned, "MOST_PINNED_BYTES", 2 * len(content) // 3)
    run(SETTINGS, register_inputs, tmp_path, Environment.read())
    less, other = kept(runs)
    assert less.count(b"\n") == 2 and sha256(less).hexdigest() == other != tag


def test_a_name_that_only_the_registry_takes_is_registered(
    runs: Path, tmp_path: Path, register_inputs: dict[str, Manifest]
) -> None:
    """A logged model may have no dot in its name: `nvila-1.5` was trained for days, and refused at the end."""
    settings = Settings.model_validate({"register": {"model_name": "nvila-1.5"}})
    made = run(settings, register_inputs, tmp_path, Environment.read()).result
    assert isinstance(made, Registration) and made.model_uri == "models:/nvila-1.5/1"


def test_the_card_says_what_is_wrong_with_the_model(register_inputs: dict[str, Manifest]) -> None:
    """Whoever picks a version in the registry reads nothing else."""
    register_inputs["metrics"].result = quantized_evaluation({"digits": retained(0.21, full=0.71)})
    assert "**Lost by quantization: digits**" in model_card("small", register_inputs)
    register_inputs["full"].result = evaluation({"digits": scored(0.71, 0.41)})
    assert "**Not above its baseline: digits**" in model_card("small", register_inputs)


def test_the_card_says_how_the_data_was_pruned(tmp_path: Path, register_inputs: dict[str, Manifest]) -> None:
    """A model of half of the data, chosen by references that knew nothing, looks like any other."""
    found = Pruning(
        method="deltaloss",
        sources={"digits": pruned(n=9600, kept=4800)},
        judged={"digit": judged(), "yes/no": judged(trusted=False, why="it knows no more than the small one")},
    )
    kept = manifest(tmp_path, "prune-image", "dataset", found)
    unused = manifest(tmp_path, "prune-video", "dataset", Pruning(sources={}))
    stage = manifest(tmp_path, "train-4", "model", training(), kept_image=kept)
    last = manifest(tmp_path, "train-5", "model", training(), model=stage, kept_image=kept, kept_video=unused)
    model = manifest(tmp_path, "quantize", "model", quantization(), model=last)
    card = model_card("small", register_inputs | {"model": model})
    assert card.count("prune-") == 1
    assert (
        "- prune-image: 4,800 of 9,600 samples stay, ranked by DeltaLoss. "
        "The references can be believed in 1 of 2 kinds of question.\n"
    ) in card


def test_another_model_is_another_version(runs: Path, tmp_path: Path, register_inputs: dict[str, Manifest]) -> None:
    """Two different models under one version would make lineage and rollback lie."""
    run(SETTINGS, register_inputs, tmp_path, Environment.read())
    changed = register_inputs["model"].model_copy(update={"result": quantization(linears={})})
    again = run(SETTINGS, register_inputs | {"model": changed}, tmp_path, Environment.read())
    assert isinstance(again.result, Registration) and again.result.version == "2"
    assert find(runs, "small", "2") is not None


@pytest.mark.parametrize("again", [False, True])
def test_damaged_weights_are_not_registered(
    runs: Path, tmp_path: Path, register_inputs: dict[str, Manifest], again: bool
) -> None:
    """Registered once, the wrong weights are what each later rollout takes; also where the version is there already."""
    if again:
        run(SETTINGS, register_inputs, tmp_path, Environment.read())
    path = Path(register_inputs["model"].folder, "model", "model.safetensors")
    path.write_text("WEIGHTS")
    with pytest.raises(DamagedError, match="safetensors"):
        run(SETTINGS, register_inputs, tmp_path, Environment.read())


def test_registered_model_loads_through_mlflow_and_answers(
    runs: Path, tmp_path: Path, register_inputs: dict[str, Manifest], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The registered artifact must be usable by MLflow alone: our loader gets the checkpoint, rows become answers."""
    from PIL import Image

    seen: list[tuple[Path, int]] = []

    class Small:
        config = types.SimpleNamespace(sampling=Sampling(2))

        def eval(self) -> None: ...

    def generate(model: Small, tokenizer: object, prompts: list, max_new_tokens: int) -> list[str]:
        seen.append((prompts[0][1][0].size, max_new_tokens))
        return [f"{prompts[0][0][0].text} yes"]

    def load(folder: Path) -> tuple[Small, None]:
        assert (Path(folder) / "model.safetensors").read_text() == "weights"
        return Small(), None

    monkeypatch.setitem(
        sys.modules, "nvila.components.model.checkpoint.quantized", types.SimpleNamespace(load_quantized=load)
    )
    prompt = types.SimpleNamespace(make_prompt=lambda turns, media, config: (turns, media))
    monkeypatch.setitem(sys.modules, "nvila.components.model.text.prompt", prompt)
    monkeypatch.setitem(sys.modules, "nvila.components.model.decode.answer", types.SimpleNamespace(generate=generate))
    run(SETTINGS, register_inputs, tmp_path, Environment.read())

    import mlflow
    from mlflow.exceptions import MlflowException

    monkeypatch.setattr(mlflow, "get_tracking_uri", mlflow.get_tracking_uri)
    mlflow.set_tracking_uri(sqlite_url(runs / "mlflow.db"))
    try:
        model = mlflow.pyfunc.load_model("models:/small/1")
    finally:
        mlflow.set_tracking_uri(None)
    stream = io.BytesIO()
    Image.new("RGB", (5, 4)).save(stream, "PNG")
    picture = base64.b64encode(stream.getvalue()).decode()
    assert model.predict(pandas.DataFrame({"question": ["red?"], "image": [picture]})) == ["red? yes"]
    assert seen == [((5, 4), 32)]
    assert model.metadata.signature is not None
    with pytest.raises(DataError, match="neither a file nor base64"):
        model.predict(pandas.DataFrame({"question": ["red?"], "image": ["/no/such/file.png"]}))
    with pytest.raises(MlflowException, match="question"):
        model.predict(pandas.DataFrame({"image": [picture]}))


def test_the_registered_model_sees_the_frames_that_training_saw(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prevents clips that are sampled at another rate than in training, and media that move to the front."""
    from servable import clip, servable_model

    from nvila.components.data.media import load_video_frames
    from nvila.components.model.checkpoint.serving import write_serving
    from nvila.components.model.decode import answer
    from nvila.components.model.text.conversation import Turn
    from nvila.components.model.text.prompt import Prompt, make_prompt
    from nvila.components.register.served import Answerer

    model, tokenizer = servable_model(sampling=Sampling(4, 4.0))
    write_serving(model, tokenizer, tmp_path / "model")
    path, question = clip(tmp_path / "clip.mp4", 1), "Which <vila/video> digit?"
    seen: list[Prompt] = []
    served = Answerer(tmp_path / "model")
    monkeypatch.setattr(answer, "generate", lambda model, tokenizer, prompts, **_: seen.extend(prompts) or ["four"])
    assert served.predict(pandas.DataFrame({"question": [question], "video": [str(path)]})) == ["four"]
    expected, other = (
        make_prompt([Turn("human", question)], [load_video_frames(path, Sampling(4, fps))], model.config)
        for fps in (4.0, 0.0)
    )
    assert seen[0].encode(tokenizer, generate=True) == expected.encode(tokenizer, generate=True)
    assert torch.equal(seen[0].visuals[0].tiles, expected.visuals[0].tiles)
    assert not torch.equal(expected.visuals[0].tiles, other.visuals[0].tiles)
