"""What belongs together: kinds of answers, clusters of questions, fields of the records."""

from __future__ import annotations

import json
from typing import Any

import pyarrow
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nvila.components.contracts.errors import DataError
from nvila.components.contracts.recipe.prune import PruneSettings
from nvila.components.prune import groups as module
from nvila.components.prune.groups import COMMON_ANSWERS, FIELD_VALUES, Grouping, answer_kind, answer_name


@pytest.mark.parametrize(
    ("answer", "kind"),
    [
        ("Yes.", "yes/no"),
        ("no", "yes/no"),
        ("**Yes!**", "yes/no"),
        ("“NO”", "yes/no"),
        ("3", "number"),
        ("(3.)", "number"),
        ("\u22123", "number"),
        ("\uff13\uff15", "number"),
        ("1\u202f250,5", "number"),
        ("1.5e-3", "number"),
        ("5 km", "phrase"),
        ("3, 4", "phrase"),
        ("-1,250.5 %", "number"),
        ("triangle", "word"),
        ("", "word"),
        ("e\u0301tage", "word"),
        ("a red circle", "phrase"),
        ("yes, it is", "phrase"),
        ("12:30 o'clock", "phrase"),
        ("the picture shows a red circle on a table", "text"),
        ("圖" * 200, "text"),
    ],
)
def test_kinds_of_answers(answer: str, kind: str) -> None:
    """A kind that follows spelling would part what belongs together."""
    assert answer_kind(answer) == kind


def batch(rows: list[tuple[str, str, str]], fields: list[dict[str, Any]] | None = None) -> pyarrow.Table:
    names = ("source", "question", "answer")
    columns = {name: [row[i] for row in rows] for i, name in enumerate(names)}
    return pyarrow.table(columns | ({"fields": [json.dumps(one) for one in fields]} if fields else {}))


def grouping(table: pyarrow.Table, *within: str, **more: Any) -> Grouping:
    prune = PruneSettings.model_validate({"within": list(within)} | more)
    return Grouping.fit(lambda: [table.slice(0, len(table) // 2), table.slice(len(table) // 2)], prune, 0)


def test_a_source_alone_is_judged_by_kinds_of_answers() -> None:
    """Judged as a whole, a reference that knows colours is believed about shapes."""
    table = batch([("s", "Is it red?", "yes"), ("s", "Which?", "red"), ("t", "How many?", "3")])
    assert grouping(table).of(table) == (["s", "s", "t"], ["s / yes/no", "s / word", "t / number"])


def test_the_answer_is_no_kind_of_question() -> None:
    """Judged among the samples that say yes, whoever always says yes cannot be beaten."""
    table = batch([("s", "Is it red?", answer) for answer in ("yes", "No.", "yes")])
    assert grouping(table, "answer").of(table) == (["s / yes", "s / no", "s / yes"], ["s / yes/no"] * 3)


def test_rare_answers_are_one_group() -> None:
    """A group of one sample keeps it, whatever its score: a source of free answers would not be pruned at all."""
    rows = [("s", "Which?", f"a{n}") for n in range(COMMON_ANSWERS)] * 2 + [("s", "Which?", f"b{n}") for n in range(9)]
    groups, _ = grouping(batch(rows), "answer").of(batch(rows))
    assert groups[-9:] == ["s / other answers"] * 9 and len(set(groups)) == COMMON_ANSWERS + 1


def test_few_questions_are_their_own_clusters() -> None:
    """A hundred samples of two questions are two groups, not eight of chance."""
    rows = [("s", f"Which digit is in row {n % 2 + 1}?", str(n)) for n in range(100)]
    groups, kinds = grouping(batch(rows), "question").of(batch(rows))
    assert set(groups) == {"s / Which digit is in row 1?", "s / Which digit is in row 2?"} and kinds == groups
    assert grouping(batch(rows), "question").of(batch([("s", "Who?", "x")]))[0] == ["s / other questions"]


def test_questions_of_a_kind_fall_into_one_cluster() -> None:
    """Clusters that mix kinds of questions are the groups that harmed the demonstration."""
    colours = [f"What color is the {thing}?" for thing in ("ball", "car", "house", "tree", "dog", "cat", "sky")]
    counts = [f"How many {things} are there?" for things in ("balls", "cars", "houses", "trees", "dogs", "cats")]
    rows = [("s", question, "x") for question in colours + counts]
    first, second = (grouping(batch(rows), "question", question_clusters=2).of(batch(rows))[0] for _ in "ab")
    assert first == second and len(set(first)) == 2
    assert len(set(first[: len(colours)])) == 1 and len(set(first[len(colours) :])) == 1
    assert all(name.startswith("s / question: ") for name in first)


def test_fields_of_the_record_group() -> None:
    """A user who says what belongs together is to be heard; a record that says nothing is a value of its own."""
    table = batch([("s", "q", "a")] * 3, [{"topic": "signs"}, {"topic": 7}, {}])
    groups, kinds = grouping(table, "field:topic").of(table)
    assert groups == kinds == ["s / topic signs", "s / topic 7", "s / no topic"]
    flags = batch([("s", "q", "a")] * 2, [{"topic": True}, {"topic": 1.5}])
    assert grouping(flags, "field:topic").of(flags)[0] == ["s / topic true", "s / topic 1.5"]
    old = batch([("s", "q", "a")])
    assert grouping(table, "field:topic").of(old)[0] == ["s / no topic"]


@pytest.mark.parametrize("fields", [None, [{"topics": "signs"}] * 3])
def test_a_field_that_no_record_has_is_refused(fields: list[dict[str, Any]] | None) -> None:
    """A misspelt name would group nothing, without a word."""
    table = batch([("s", "q", "a")] * 3, fields)
    with pytest.raises(DataError, match="no sample to prune has a field 'topic'"):
        grouping(table, "field:topic")


def test_a_field_that_names_every_record_is_refused() -> None:
    """Grouped by a file name, every sample would be kept: pruning would do nothing, without a word."""
    many = batch([("s", "q", "a")] * (FIELD_VALUES + 1), [{"file": n} for n in range(FIELD_VALUES + 1)])
    with pytest.raises(DataError, match="'file' has more than 1000 values"):
        grouping(many, "field:file")


def test_long_answers_have_short_names() -> None:
    """Names of groups go into manifest and report: a page of text in each would bury them, or two become one."""
    one, two = ("word " * 500 + end for end in ("a", "b"))
    assert len(answer_name(one)) < 80 and answer_name(one) != answer_name(two)
    assert answer_name(" A red\n circle. ") == "a red circle"


def test_the_clusters_do_not_follow_the_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chosen as they come, the questions at the head of a sorted table would make all the clusters."""
    monkeypatch.setattr(module, "FITTED_QUESTIONS", 20)
    rows = [("s", f"Is the {colour} {n} here?", "x") for colour in ("red", "blue") for n in range(100)]
    forth, back = (grouping(batch(some), "question").of(batch(rows))[0] for some in (rows, rows[::-1]))
    assert forth == back and len(set(forth)) > 2


_TEXT = st.text(max_size=40)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from("ab"), _TEXT, _TEXT), min_size=1, max_size=30),
    st.sets(st.sampled_from(["answer-kind", "answer", "question", "field:f"])),
)
def test_any_text_finds_its_group(rows: list[tuple[str, str, str]], within: set[str]) -> None:
    """An odd question or answer must not end a step that has read millions of them, nor fall elsewhere when read in
    another batch."""
    table = batch(rows, [{"f": row[1]} for row in rows])
    known = grouping(table, *sorted(within), question_clusters=2)
    whole = known.of(table)
    single = [known.of(table.slice(i, 1)) for i in range(len(rows))]
    assert whole == ([one[0][0] for one in single], [one[1][0] for one in single])
    assert all(group.split(" / ")[0] == row[0] for group, row in zip(whole[0], rows, strict=True))
    alike = {(group, kind.split(" / ")[0]) for group, kind in zip(*whole, strict=True)}
    assert len(alike) == len(set(whole[0]))
