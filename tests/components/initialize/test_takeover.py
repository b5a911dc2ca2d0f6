"""`initialize` of a recipe that starts from a whole model: which it takes, what of it, and what its key follows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from nvila.components.contracts.environment import Environment
from nvila.components.contracts.errors import ConfigError, DamagedError, DataError
from nvila.components.contracts.manifest import START, Manifest, describe_files
from nvila.components.contracts.recipe.model import Base, ModelSettings
from nvila.components.contracts.recipe.train import Stage
from nvila.components.contracts.results.model import Quantization
from nvila.components.contracts.results.result import SkippedRecords
from nvila.components.contracts.store import Store
from nvila.components.initialize import step
from nvila.components.model.checkpoint.convert import convert
from nvila.components.model.checkpoint.native import load_native
from nvila.components.preflight.start import problems
from nvila.components.tracking.registry import lineage_tags, promote, register_version
from nvila.components.tracking.trained import identity


def settings(place: str | Path) -> step.Settings:
    """The slice of a recipe that starts there."""
    return step.Settings(model=ModelSettings(base=Base(model=str(place))), seed=0, max_skipped_share=0.0)


def taken(place: str | Path, out: Path, runs: Path) -> Any:
    """What the step makes of it."""
    return step.run(settings(place), {}, out, Environment(run=runs / "r"))


@pytest.mark.parametrize("layout", ["native", "vila", "hf"])
def test_a_checkpoint_of_any_layout_is_taken_over(small: Any, tmp_path: Path, layout: str) -> None:
    """A tensor lost or renamed on the way is a random one, in a model that answers nearly as before."""
    source, start = small.model.dir("model"), tmp_path / "start"
    try:
        convert(source, start, layout)
    except ConfigError:
        pytest.skip("this layout has no place for the small model")
    made = taken(start, tmp_path / "out", tmp_path)
    taken(start, tmp_path / "out", tmp_path)  # as after an attempt that ended before its manifest
    (mine, _), (theirs, _) = load_native(tmp_path / "out" / "model"), load_native(source)
    assert mine.config == theirs.config
    weights = theirs.state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in mine.state_dict().items())
    assert made.result.parameters["llm"] == sum(p.numel() for p in mine.llm.parameters())
    assert (made.result.start, made.start) == (str(start), None)
    assert made.read == step.external(settings(start).model_dump(), Environment(run=tmp_path / "r"))


def test_a_model_that_cannot_be_trained_is_refused_before_anything_long(small: Any, tmp_path: Path) -> None:
    """Found out in stage 1, it costs the validation of all data; and a serving folder has lost blocks for good."""
    convert(small.model.dir("model"), tmp_path / "served", "serving")
    with pytest.raises(ConfigError, match=r"serving folder.*its version in the registry"):
        taken(tmp_path / "served", tmp_path / "out", tmp_path)
    with pytest.raises(DataError, match="no such folder"):
        taken(tmp_path / "nowhere", tmp_path / "out", tmp_path)
    stage = Stage(name="x", trainable=["llm"], learning_rate=1e-4, data={"a.sft": 1}, batch=8)
    (said,) = problems(str(tmp_path / "served"), [stage], tmp_path)
    assert said.startswith("model.base.model: model.base.model: a serving folder")
    assert problems(str(small.model.dir("model")), [stage], tmp_path) == []
    pools = {"model": {"video": {"frames": 6, "pool_sizes": [(4, 1, 1)]}}}
    changed = Stage.model_validate(stage.model_dump() | pools)
    assert problems(str(small.model.dir("model")), [changed], tmp_path) != []


def registered(runs: Path, small: Any, name: str) -> Manifest:
    """A trained model in a store, quantized there and registered as the champion; returns the trained one."""
    store = Store(runs.parent / "store")
    trained = _kept(store, "train-1", name, convert, small.model.dir("model"))

    def quantize(source: Path, target: Path, _: str) -> None:
        target.mkdir(parents=True)
        (target / "config.json").write_text(f'{{"nvila": {{}}, "of": "{name}"}}')

    told = {"bytes_before": 2, "bytes_after": 1, "linears": {}, "method": "rtn", "group_size": 32}
    result = Quantization(**told, calibration_samples=0, skipped=SkippedRecords())
    quantized = _kept(store, "quantize", name, quantize, small.model.dir("model"), trained, result)

    def logged(client: Any) -> dict[str, str]:
        model = client.create_logged_model("0", name="small")
        return {"source": "file:///x", "model_id": model.model_id, "run_id": client.create_run("0").info.run_id}

    tags = lineage_tags({"model": quantized})
    version = register_version(runs, "small", quantized.digest, logged, description="", tags=tags)
    promote(runs, "small", version.version)
    return trained


def _kept(
    store: Store, name: str, key: str, write: Any, source: Path, model: Manifest | None = None, result: Any = None
) -> Manifest:
    folder = store.folder(name, key)
    folder.mkdir(parents=True)
    write(source, folder / "model", "native")
    (folder / "key.txt").write_text(key)
    refs = {n: ref.model_dump() for n, ref in ({"model": _ref(model)} if model else {}).items()}
    manifest = Manifest(step=name, key=key, kind="model", inputs=refs, files=describe_files(folder), result=result)
    manifest = manifest.model_copy(update={"folder": str(folder)})
    manifest.save(folder / "manifest.json")
    return manifest


def _ref(manifest: Manifest) -> Any:
    from nvila.components.contracts.manifest import InputRef

    place = f"{manifest.folder}/manifest.json"
    return InputRef(step=manifest.step, uri=place, digest=manifest.digest)


def test_a_registered_model_is_trained_from_what_it_was_quantized_from(
    small: Any, tracked_run: Path, tmp_path: Path
) -> None:
    """4-bit weights cannot be trained; a key of the name alone would go on from yesterday's champion."""
    runs = tracked_run.parent
    first = registered(runs, small, "first")
    known = identity("small@champion", runs)
    assert known == {"version": "models:/small/1", "digest": first.digest}
    outcome = taken("small@champion", tmp_path / "out", runs)
    assert (outcome.read, outcome.start.digest) == ({"model": known}, first.digest)
    assert load_native(tmp_path / "out" / "model")[0].config == load_native(Path(first.folder, "model"))[0].config
    second = registered(runs, small, "second")
    assert identity("small@champion", runs) == {"version": "models:/small/2", "digest": second.digest}
    assert identity("small/1", runs) == known
    weights = next(Path(second.folder, "model").rglob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    with pytest.raises(DamagedError, match="safetensors"):
        taken("small@champion", tmp_path / "out", runs)
    Path(first.folder, "manifest.json").unlink()
    with pytest.raises(ConfigError, match=r"that models:/small/1 was quantized from cannot be read.*folder of a check"):
        taken("small/1", tmp_path / "out", runs)


def test_what_was_started_from_is_an_input_of_no_step(small: Any, tmp_path: Path) -> None:
    """Lineage leads on to the run before; a store that counts it among the steps' inputs makes the work again."""
    store, key = Store(tmp_path / "store"), "k" * 20
    manifest = _kept(store, "initialize", key, convert, small.model.dir("model"))
    manifest.inputs[START] = _ref(small.model)
    manifest.save(store.folder("initialize", key) / "manifest.json")
    assert store.finished("initialize", key, {}) is not None
    assert store.finished("initialize", key, {"samples": "0" * 64}) is None
