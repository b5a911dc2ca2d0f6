from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from telling import quantized_evaluation

from nvila.components.contracts.environment import Environment
from nvila.components.contracts.errors import DamagedError, Rejected
from nvila.components.contracts.manifest import Kind, Manifest, describe_files
from nvila.components.contracts.results.result import Result
from nvila.components.contracts.results.run import Registration, Rollout
from nvila.components.metrics.pinned import Pinned, choose
from nvila.components.model.text.conversation import Place
from nvila.components.rollout import step as rollout
from nvila.components.rollout.local import Candidate, Served
from nvila.components.tracking.connect import connected
from nvila.components.tracking.registry import DECISION_TAG, find


def manifest(
    root: Path, step: str, kind: Kind, result: Result | None, rows: list[dict[str, Any]] | None = None
) -> Manifest:
    import pyarrow
    import pyarrow.parquet as parquet

    folder = root / step
    (folder / "model").mkdir(parents=True)
    (folder / "model" / "config.json").write_text("{}")
    if rows:
        name = "samples.parquet" if kind == "dataset" else "predictions.parquet"
        parquet.write_table(pyarrow.Table.from_pylist(rows), folder / name)
    return Manifest(step=step, key="k" * 64, kind=kind, result=result, files=describe_files(folder), folder=str(folder))


@pytest.fixture
def inputs(tmp_path: Path) -> dict[str, Manifest]:
    samples, predictions = [], []
    for source, kind, name in (("clips", "video", "c.mp4"), ("digits", "image", "d.png")):
        for i in range(20):
            turns = json.dumps([{"from": "human", "value": "<image>\nWhich?"}, {"from": "gpt", "value": str(i)}])
            same = {"id": f"{source}/heldout/{i}", "source": source, "root": str(tmp_path), "media": [name],
                    "question": "Which?", "answer": str(i)}  # fmt: skip
            samples.append(
                same | {"kind": kind, "split": "heldout", "media_sha256": ["0"], "conversations": turns, "line": i}
            )
            predictions.append(same | {"prediction": "7", "correct": i == 7})
    return {
        "version": manifest(tmp_path, "register", "version", Registration(name="small", version="2", model_uri="")),
        "model": manifest(tmp_path, "quantize", "model", None),
        "metrics": manifest(tmp_path, "evaluate-quantized", "metrics", quantized_evaluation({}, 5), predictions),
        "samples": manifest(tmp_path, "validate", "dataset", None, samples),
    }


def settings(**rollout_options: Any) -> rollout.Settings:
    return rollout.Settings.model_validate({"rollout": rollout_options})


def test_pinned_prompts_are_the_same_each_time_and_take_the_sources_in_turn(
    inputs: dict[str, Manifest], tmp_path: Path
) -> None:
    """A different draw each run would make the decision a matter of luck; one source alone would hide the others."""
    chosen, root = choose(inputs["metrics"], inputs["samples"], 6), tmp_path
    assert chosen == choose(inputs["metrics"], inputs["samples"], 6)
    assert [p.id.partition("/")[0] for p in chosen] == ["clips", "digits"] * 3
    assert {p.question for p in chosen} == {
        ("", Place((kind, root / name)), "\nWhich?") for kind, name in (("video", "c.mp4"), ("image", "d.png"))
    }
    assert all(p.expected == "7" for p in chosen)


def test_more_prompts_than_there_are(inputs: dict[str, Manifest]) -> None:
    """A small held-out set must give what it has, for the policy to judge."""
    assert len(choose(inputs["metrics"], inputs["samples"], 1000)) == 40


def test_promotion_moves_the_aliases(
    tracked_run: Path, inputs: dict[str, Manifest], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """`champion` must name what users are served, and `previous` what to go back to; a repeat must not lose it."""
    runs = tracked_run.parent
    with connected(runs) as client:
        client.create_registered_model("small")
        for _ in range(2):
            client.create_model_version("small", source="file:///nowhere")
        client.set_registered_model_alias("small", "champion", "1")
    asked: list[tuple[Candidate, list[Pinned], int]] = []

    def reconcile(
        runs: Path, candidate: Candidate, prompts: list[Pinned], policy: object, strategy: str, longest: int
    ) -> Served:
        tried = find(runs, "small", "challenger")
        assert tried is not None and tried.version == "2", "who looks at the registry meanwhile sees nothing of it"
        asked.append((candidate, prompts, longest))
        return Served("http://127.0.0.1:1", {"asked": 3}, ["3 of 3"], {"seconds_until_asked": 1.0})

    monkeypatch.setattr(rollout, "reconcile", reconcile)
    for _ in range(2):
        outcome = rollout.run(settings(policy={"pinned_prompts": 3}), inputs, tmp_path, Environment.read())
        champion, previous = find(runs, "small", "champion"), find(runs, "small", "previous")
        assert champion is not None and champion.version == "2"
        assert previous is not None and previous.version == "1"
        assert champion.tags[DECISION_TAG] == "promoted: 3 of 3"
    assert outcome.result == Rollout(
        model="small", version="2", endpoint="http://127.0.0.1:1", decision="promoted", pinned={"asked": 3},
        reasons=["3 of 3"],
    )  # fmt: skip
    candidate, prompts, longest = asked[0]
    assert (candidate.version.digest, len(prompts), longest) == (inputs["model"].digest, 3, 5)


def test_refused_version_loses_its_aliases(
    tracked_run: Path, inputs: dict[str, Manifest], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The alias is what other tools deploy: it must not name a version that was refused, and the registry says why."""
    runs = tracked_run.parent
    with connected(runs) as client:
        client.create_registered_model("small")
        for _ in range(2):
            client.create_model_version("small", source="file:///nowhere")
        client.set_registered_model_alias("small", "champion", "1")

    def refuse(*_: object) -> Served:
        raise Rejected("rollout refuses the new version: 3 of 4 requests failed")

    monkeypatch.setattr(rollout, "reconcile", refuse)
    with pytest.raises(Rejected):
        rollout.run(settings(), inputs, tmp_path, Environment.read())
    champion, version = find(runs, "small", "champion"), find(runs, "small", "2")
    assert champion is not None and champion.version == "1" and find(runs, "small", "challenger") is None
    assert version is not None and version.aliases == () and "3 of 4 requests failed" in version.tags[DECISION_TAG]
    with connected(runs) as client:
        client.set_registered_model_alias("small", "champion", "2")  # it is served, and answers otherwise by now
    with pytest.raises(Rejected):
        rollout.run(settings(), inputs, tmp_path, Environment.read())
    assert find(runs, "small", "champion") is None


def test_target_none_starts_nothing(
    inputs: dict[str, Manifest], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A recipe that registers only must not need a serving environment."""
    monkeypatch.setattr(rollout, "reconcile", lambda *_: pytest.fail("a server was started"))
    told = rollout.run(settings(target="none"), inputs, tmp_path, Environment.read()).result
    assert isinstance(told, Rollout) and (told.endpoint, told.decision) == (None, "registered, not rolled out")


@pytest.mark.parametrize("harm", ["flipped", "registered otherwise"])
def test_other_bytes_than_were_registered_are_not_served(
    tracked_run: Path, inputs: dict[str, Manifest], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, harm: str
) -> None:
    """The store is a folder that many can write; the registry says which model was meant."""
    monkeypatch.setattr(rollout, "reconcile", lambda *_: pytest.fail("it was served"))
    model = inputs["model"]
    with connected(tracked_run.parent) as client:
        client.create_registered_model("small")
        for _ in range(2):
            digest = "d" * 64 if harm == "registered otherwise" else model.digest
            client.create_model_version("small", source="file:///nowhere", tags={"nvila.digest": digest})
    if harm == "flipped":
        Path(model.folder, "model", "config.json").write_text("[]")
        with pytest.raises(DamagedError, match=r"config\.json"):
            rollout.run(settings(), inputs, tmp_path, Environment.read())
    else:
        with pytest.raises(Rejected, match="registered with another model"):
            rollout.run(settings(), inputs, tmp_path, Environment.read())
