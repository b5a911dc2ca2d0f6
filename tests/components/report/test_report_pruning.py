"""What the report tells of pruning, whatever the method was, however many samples there were, whatever has become of
the tables and the pictures since."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pyarrow
import pyarrow.parquet as parquet
import pytest
from telling import judged, pruned

from nvila.components.contracts.digests import file_sha256
from nvila.components.contracts.errors import DataError
from nvila.components.contracts.manifest import Manifest, describe_files
from nvila.components.contracts.results.model import Composition, PrunedGroup, Pruning
from nvila.components.contracts.results.result import SkippedRecords
from nvila.components.report import pruning, scores
from nvila.components.report.pruning import prune_parts
from nvila.components.report.scores import BINS, find, histograms
from nvila.components.report.step import render
from nvila.components.runner.status import Run

MakeRun = Callable[..., Path]


def told(found: Pruning) -> Run:
    """A run of which nothing but this is known."""
    return Run(
        Path("r"), manifests={"prune-image": Manifest(step="prune-image", key="k", kind="dataset", result=found)}
    )


def text(run: Run) -> str:
    html = render(run)
    return html[html.index('<h2 id="pruning">') :] if '<h2 id="pruning">' in html else ""


def manifest_of(run_dir: Path, step: str) -> Path:
    return Path(json.loads((run_dir / "steps" / f"{step}.json").read_text())["manifest"])


def rewrite(run_dir: Path, step: str, name: str, write: Callable[[Path], object]) -> Run:
    """The run with another file in a step's folder, as if the step had written it so."""
    manifest = manifest_of(run_dir, step)
    write(manifest.parent / name)
    made = Manifest.load(manifest)
    made.model_copy(update={"files": describe_files(manifest.parent, made.files)}).save(manifest)
    return Run.read(run_dir)


def group(**told: Any) -> PrunedGroup:
    usual: dict[str, Any] = {"source": "shapes", "n": 400, "kept": 200, "ranked_by": "deltaloss", "kinds": ["colour"]}
    return PrunedGroup(**usual | told)


BAD = {"trusted": False, "why": "the loss of the large reference is not lower than that of the small one"}


@pytest.mark.parametrize(
    ("kinds", "said", "tone"),
    [
        ({"colour": judged(), "yes/no": judged()}, "can be believed in each of 2 kinds of question.", "good"),
        ({"colour": judged(), "yes/no": judged(**BAD)}, "can be believed in 1 of 2 kinds of question, but not in:",
         "neutral"),
        ({"colour": judged(**BAD), "yes/no": judged(**BAD)}, "cannot be believed in any of 2 kinds", "neutral"),
        ({"colour": judged()}, "can be believed.", "good"),
    ],
)  # fmt: skip
def test_whether_the_references_can_be_believed_is_the_first_thing_said(
    kinds: dict[str, Any], said: str, tone: str
) -> None:
    """Scores of references that have learnt nothing look like any others."""
    (part,) = prune_parts(told(Pruning(method="deltaloss", sources={"shapes": pruned()}, judged=kinds)))
    assert said in part["trust"] and part["tone"] == tone
    assert len(part["doubts"].shown) == sum(not of.trusted for of in kinds.values())


@pytest.mark.parametrize(
    ("groups", "fate"),
    [
        ({"a": group(kept=400, ranked_by="none")}, "1 group of 400 samples stays whole"),
        ({"a": group(kept=400, ranked_by="none"), "b": group(n=5000, kept=5000, ranked_by="none")},
         "2 groups of 5,400 samples stay whole"),
        ({"a": group(ranked_by="random")}, "200 of the 400 samples of 1 group stay, chosen at random"),
        ({"a": group(kinds=["another"], ranked_by="random")}, "No sample is of this kind"),
    ],
)  # fmt: skip
def test_what_became_of_groups_that_were_not_ranked(groups: dict[str, Any], fate: str) -> None:
    """`Not trusted` alone leaves open whether half of the data went by chance."""
    found = Pruning(method="deltaloss", sources={"shapes": pruned()}, judged={"colour": judged(**BAD)}, groups=groups)
    (part,) = prune_parts(told(found))
    first = part["doubts"].shown[0]
    assert first == {"kind": "colour", "why": BAD["why"], "fate": fate}


def test_groups_of_a_method_that_asks_no_reference_are_told() -> None:
    """With DeltaLoss merely compared, the page said of a kind with thousands of samples that there were none."""
    groups = {"a": group(ranked_by="random")}
    found = Pruning(method="random", sources={"shapes": pruned()}, judged={"colour": judged(**BAD)}, groups=groups)
    (doubt,) = prune_parts(told(found))[0]["doubts"].shown
    assert doubt["fate"] == "200 of the 400 samples of 1 group stay, chosen at random"


def test_groups_that_no_question_stands_for_are_told() -> None:
    """A field's value without a single held-out question is judged by nobody."""
    groups = {"a": group(), "b": group(kinds=list("abcd"), ranked_by="none", kept=400)}
    found = Pruning(method="deltaloss", sources={"shapes": pruned()}, judged={"colour": judged()}, groups=groups)
    (doubt,) = prune_parts(told(found))[0]["doubts"].shown
    assert doubt["kind"] == "a, b, c and 1 more" and "1 group of 400" in doubt["fate"]


@pytest.mark.parametrize(
    ("ranked_by", "kept", "said"),
    [
        (["none", "none"], 800, "All 800 samples stay"),
        (["random", "random"], 400, "400 of 800 samples stay, chosen at random"),
        (["random", "deltaloss"], 400, "400 of 800 samples stay, partly ranked by DeltaLoss, partly chosen at random"),
        (["none", "deltaloss"], 600, "600 of 800 samples stay, ranked by DeltaLoss"),
    ],
)
def test_the_headline_names_what_chose(ranked_by: list[str], kept: int, said: str) -> None:
    """Of references that nobody believes nothing was ranked, whatever the recipe asked for."""
    groups = {f"g{i}": group(ranked_by=by) for i, by in enumerate(ranked_by)}
    found = Pruning(method="deltaloss", sources={"shapes": pruned(kept=kept)}, groups=groups)
    assert prune_parts(told(found))[0]["title"] == said


@pytest.mark.parametrize(
    ("method", "said"),
    [
        ("none", "All 800 samples stay: nothing was pruned"),
        ("random", "400 of 800 samples stay, chosen at random"),
        ("clusters", "400 of 800 samples stay, as many from each cluster of pictures"),
    ],
)
def test_methods_without_references_show_nothing_empty(method: str, said: str) -> None:
    """Tables without rows, and a histogram of dice, make people look for what is wrong."""
    kept = 800 if method == "none" else 400
    same = {"answers": Composition(before={"a": 0.5, "b": 0.5}, after={"a": 0.5, "b": 0.5}, shift=0.0)}
    found = Pruning(
        method=method,
        sources={"shapes": pruned(kept=kept, composition=same)},
        groups={"shapes": group(kept=kept, ranked_by=method, kinds=[])},
    )
    shown = text(told(found))
    assert said in shown
    assert ("moved by" in shown) == (method != "none")
    for part in ("believed", "Believed", "in nats", "references say", "Mean score", "Kinds of question", "DeltaLoss",
                 "groups of"):  # fmt: skip
        assert part not in shown, part


def test_without_sources_there_is_no_part() -> None:
    """A step that had nothing to choose from is no subject."""
    assert text(told(Pruning(sources={}))) == ""


def test_one_reference_has_no_columns_of_two() -> None:
    """Multimodal gain asks the large reference only."""
    kind = judged(loss={"large": 0.1, "blank": 2.0}, accuracy={"large": 0.9}, against={"blank": 1.7})
    shown = text(told(Pruning(method="multimodal-gain", sources={"shapes": pruned()}, judged={"colour": kind})))
    assert "Loss: large, no picture" in shown and "The reference can be believed." in shown
    assert "Loss: small" not in shown and "Right: small" not in shown


def test_what_is_no_number_does_not_break_the_charts() -> None:
    """A loss that overflowed is told as it is; axes that end nowhere are not."""
    kind = judged(loss={"small": float("inf"), "large": float("nan"), "blank": 2.0})
    found = Pruning(method="deltaloss", sources={"shapes": pruned()}, judged={"colour": kind, "all": judged(loss={})})
    assert 'cx="nan"' not in text(told(found)) and 'cx="inf"' not in text(told(found))


def test_many_groups_kinds_and_sources_are_counted_not_listed() -> None:
    """A page with a row for each of 5,000 groups opens nowhere; those that were not ranked must not be cut off."""
    groups = {f"g{i}": group(n=i + 1, ranked_by="random" if i == 7 else "deltaloss") for i in range(60)}
    found = Pruning(
        method="deltaloss",
        sources={f"s{i}": pruned(examples={"informative": [f"{i}-{j}" for j in "abcd"]}, categories={"informative": 9})
                 for i in range(30)},
        judged={f"k{i}": judged(**BAD) for i in range(50)},
        groups=groups,
        shifted=[f"shift {i}" for i in range(20)],
        skipped=SkippedRecords(records=3, first=[]),
    )  # fmt: skip
    shown = text(told(found))
    for words in ("and 20 more groups", "and 6 more sources", "and 10 more kinds", "and 39 more kinds",
                  "and 8 more shifts", "3 samples could not be used", "60 groups of prune-image"):  # fmt: skip
        assert words in shown, words
    assert shown.count("<figure") <= pruning.PER_PAGE
    assert '<th scope="row">g7</th>' in shown and '<th scope="row">g8</th>' not in shown


def test_examples_show_their_picture_answer_and_losses(make_run: MakeRun) -> None:
    """Categories are believed when they are seen; a picture that is gone is said, as is a sample."""
    (part, _) = prune_parts(Run.read(make_run()))
    categories = {of["name"]: of for of in part["sources"].shown[0]["categories"]}
    assert list(categories) == ["informative", "too easy", "both fail", "distracting"]
    first = categories["informative"]["examples"][0]
    assert (first.question, first.answer, first.kept) == ("What is it? plain", "yes plain", True)
    assert first.picture.uri.startswith("data:image/png;base64,") and first.picture.pixelated
    assert list(first.losses) == ["small", "large"] and first.losses["large"] == "2.00"
    gone = categories["distracting"]["examples"][-1]
    assert gone.question and gone.picture.uri is None


def test_an_example_that_is_in_no_table_is_told_by_its_id(make_run: MakeRun) -> None:
    """The samples' table is not of this very run where pruning was cached and the store was cleaned."""
    run_dir = make_run()
    (manifest_of(run_dir, "validate").parent / "samples.parquet").unlink()
    shown = text(Run.read(run_dir))
    assert "shapes-0" in shown and "loss: small" in shown and "data:image" not in shown


def test_pictures_are_those_that_were_validated(make_run: MakeRun) -> None:
    """A file that was replaced, or lies elsewhere, is not what the references saw."""
    run_dir = make_run()
    secret = run_dir.parent / "secret.png"
    rows = parquet.read_table(manifest_of(run_dir, "validate").parent / "samples.parquet").to_pylist()
    media = Path(rows[0]["root"])
    secret.write_bytes((media / "shapes-sft-0.png").read_bytes())
    rows[0]["media"] = ["../runs/secret.png"]
    rows[1]["media_sha256"] = ["0" * 64]
    rows[2]["media_sha256"] = [file_sha256(media / "shapes-sft-2.png")]
    run = rewrite(run_dir, "validate", "samples.parquet",
                  lambda path: parquet.write_table(pyarrow.Table.from_pylist(rows), path))  # fmt: skip
    examples = prune_parts(run)[0]["sources"].shown[0]["categories"][0]["examples"]
    assert [example.picture.uri is not None for example in examples] == [False, False, True]


def _as_text(path: Path) -> None:
    table = parquet.read_table(path)
    changed = table.set_column(table.schema.get_field_index("score"), "score", pyarrow.array(["high"] * len(table)))
    parquet.write_table(changed, path)


def _as_before(path: Path) -> None:
    table = parquet.read_table(path).rename_columns({"score": "delta"}).drop_columns(["kind"])
    parquet.write_table(table, path)


def _without_pages(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[:4] + bytes(len(data) - 4004) + data[-4000:])


@pytest.mark.parametrize(
    "damage",
    [
        _as_text,
        _as_before,
        lambda path: path.write_bytes(b""),
        _without_pages,
        lambda path: parquet.write_table(pyarrow.table({"id": pyarrow.array([1, 2])}), path),
    ],
)
def test_a_table_that_is_old_or_damaged_does_not_break_the_page(
    make_run: MakeRun, damage: Callable[[Path], object]
) -> None:
    """The report comes last, and the whole run was called failed."""
    run_dir = make_run()
    before = text(Run.read(run_dir))
    shown = text(rewrite(run_dir, "prune-image", "scores.parquet", damage))
    assert "Scores of shapes" in before and "Scores of shapes" not in shown
    assert "Scores of clips" in shown and "1,200 of 1,600 samples stay" in shown


@pytest.mark.parametrize("score", [float("nan"), float("inf"), 1e300, None])
def test_samples_without_a_score_have_no_place_on_the_axis(tmp_path: Path, score: float | None) -> None:
    """Pruning keeps them in its table; the report, and with it the whole run, failed on the first one."""
    rows = [{"id": "x", "source": "s", "kind": "k", "score": score, "kept": True}]
    table = tmp_path / "t.parquet"
    texts = [(name, pyarrow.string()) for name in ("id", "source", "kind")]
    schema = pyarrow.schema([*texts, ("score", pyarrow.float64()), ("kept", pyarrow.bool_())])
    parquet.write_table(pyarrow.Table.from_pylist(rows, schema), table)
    assert histograms(table, ["s"], ["k"]) == {}
    more = [{**rows[0], "score": 1.0}, {**rows[0], "score": 2.0, "kept": False}]
    parquet.write_table(pyarrow.Table.from_pylist([*rows, *more], schema), table)
    (found,) = histograms(table, ["s"], ["k"]).values()
    assert (sum(found.kept), sum(found.dropped)) == (1, 1)


def test_a_histogram_of_many_stretches_counts_every_sample(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten million rows do not fit as a list; what is thinned for the axis must not be thinned for the bars."""
    monkeypatch.setattr(scores, "STRETCH_ROWS", 700)
    monkeypatch.setattr(scores, "HELD", 2000)
    dice = numpy.random.default_rng(0)
    n = 50_000
    score, source, ranked = dice.normal(size=n), dice.integers(0, 2, n), dice.random(n) < 0.8
    columns = {
        "source": numpy.array(["a", "b"])[source],
        "kind": numpy.where(ranked, "ranked", "whole"),
        "score": score,
        "kept": score > 0.4,
    }
    parquet.write_table(pyarrow.table(columns), tmp_path / "t.parquet", row_group_size=9000)
    found = histograms(tmp_path / "t.parquet", ["b", "a"], ["ranked"])
    assert list(found) == ["b", "a"]
    for number, name in enumerate("ab"):
        mine = score[ranked & (source == number)]
        of = found[name]
        assert (sum(of.kept), sum(of.dropped)) == ((mine > 0.4).sum(), (mine <= 0.4).sum())
        assert numpy.abs(numpy.quantile(mine, [0.005, 0.995]) - (of.low, of.high)).max() < 0.25
        edges = numpy.linspace(of.low, of.high, BINS + 1)
        assert numpy.histogram(mine[mine <= 0.4].clip(of.low, of.high), edges)[0].tolist() == of.dropped


def test_what_is_held_for_the_axis_is_bounded() -> None:
    """Every so many from the beginning to the end, whatever the stretches' lengths."""
    thinned = scores._Thinned()
    every = numpy.arange(1_000_000, dtype=float)
    for part in numpy.split(every, numpy.cumsum(numpy.tile([1, 5000, 65_536, 3], 14))[:-1] % 1_000_001):
        thinned.add(part)
        assert sum(map(len, thinned._parts)) <= 2 * scores.HELD
    low, high = thinned.ends()
    assert low == pytest.approx(5000, rel=0.05) and high == pytest.approx(995_000, rel=0.05)


def test_rows_are_found_by_their_ids(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that are not there are missing, as are columns of another version; the table is never read whole."""
    monkeypatch.setattr(scores, "STRETCH_ROWS", 10)
    table = pyarrow.table({"id": [f"s{i}" for i in range(100)], "kept": [True] * 100, "big": ["x"] * 100})
    parquet.write_table(table, tmp_path / "t.parquet")
    found = find(tmp_path / "t.parquet", {"s3", "s99", "lost"}, ["kept", "loss_small"])
    assert found == {name: {"id": name, "kept": True} for name in ("s3", "s99")}
    with pytest.raises(DataError, match="not a readable table"):
        find(tmp_path / "none.parquet", {"s3"}, [])


def test_values_that_are_numbers_keep_their_order() -> None:
    """Lengths in the order of their shares cannot be read as a distribution."""
    lengths = Composition(before={"8+": 0.5, "1": 0.1, "2-3": 0.4}, after={"1": 0.2, "2-3": 0.4, "8+": 0.4}, shift=0.1)
    chart = pruning._composition("shapes", "answer lengths", lengths)["chart"]
    assert chart.index("<title>1<") < chart.index("<title>2-3<") < chart.index("<title>8+<")
    many = Composition(before={f"w{i}": 0.1 for i in range(10)}, after={f"w{i}": 0.1 for i in range(10)}, shift=0.0)
    assert "2 others" in pruning._composition("shapes", "answers", many)["chart"]
    rare = Composition(before={"others": 0.9, "2": 0.06, "10": 0.04}, after={"others": 1.0}, shift=0.1)
    chart = pruning._composition("shapes", "answers", rare)["chart"]
    assert chart.index("<title>2<") < chart.index("<title>10<") < chart.index("<title>others<")
