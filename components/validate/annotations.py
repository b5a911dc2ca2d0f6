"""Reads a source's annotation files into flat rows; what they say is judged later, by the expectations.

A record whose form is odd becomes a row as well, which says so in `form`: one of many ends nothing.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from itertools import dropwhile, islice
from pathlib import Path
from typing import Any

from nvila.components.contracts.recipe.data import LABELS, Source
from nvila.components.data.layouts import Broken, read

MARKERS = {"image": ("<image>",), "video": ("<video>", "<vila/video>")}
"""Placeholders of media in a conversation, by the source's kind; the tables hold the last one of each kind."""
ANY_MARKER = re.compile(r"<image>|<video>|<vila/video>")

ROLES = {"human": "human", "user": "human", "gpt": "gpt", "assistant": "gpt"}
"""Who speaks, as LLaVA's form and as OpenAI's names them."""
TURNS = {"conversations": ("from", "value"), "messages": ("role", "content")}
"""Keys of a record that hold its turns, each with the keys of a turn's role and text."""

FIELDS, FIELD_CHARACTERS = 32, 200
"""Of a record's own fields: how many are kept, the first by name; how long a name or a text may be."""

Row = dict[str, Any]


class _Odd(Exception):
    """A record of another form: the quarantine's reason, and what is wrong in words."""

    def __init__(self, reason: str, detail: str) -> None:
        self.reason, self.detail = reason, detail


def read_records(source: Source, split: str, path: Path) -> list[Row]:
    """One row per record of a conversation file, with the measures that the expectations look at.

    Raises:
        DataError: a broken file; names file and line.
    """
    return _rows(source, split, path, _record)


def read_label_rows(source: Source, path: Path) -> list[Row]:
    """One row per record of `labels.json`.

    Raises:
        DataError: as `read_records`.
    """
    return _rows(source, LABELS, path, _label)


def _rows(source: Source, split: str, path: Path, parsed: Callable[[Source, str, dict[str, Any]], Row]) -> list[Row]:
    rows = []
    blank = dict(_NO_LABEL if split == LABELS else _NO_RECORD)
    for index, record in enumerate(read(path, source.layout_of(split))):
        row = blank | {"form": "ok", "form_detail": ""}
        try:
            row |= parsed(source, split, _object(record))
        except _Odd as odd:
            row |= {"form": odd.reason, "form_detail": odd.detail}
        identity = _identity(record)
        row |= {
            "record": f"{source.name}/{path.name}[{index}]",
            "id": f"{source.name}/{split}/{f'#{index}' if identity is None or split == LABELS else identity}",
            "source": source.name,
            "kind": source.kind,
            "split": split,
            "root": str(path.parent),
            "line": index,
        }
        rows.append(row)
    return rows


def _object(record: Any) -> dict[str, Any]:
    if isinstance(record, Broken):
        raise _Odd("broken_json", record.why)
    if not isinstance(record, dict):
        raise _Odd("not_a_record", f"a record is a JSON object, not {_called(record)}")
    try:
        json.dumps(record, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise _Odd("bad_text", "a text with half of a surrogate pair") from None
    return record


def _identity(record: Any) -> str | None:
    """What a record calls itself; None where it does not, and its place in the file does."""
    given = record.get("id") if isinstance(record, dict) else None
    known = isinstance(given, (str, int)) and not isinstance(given, bool) and str(given) != ""
    return str(given).encode("utf-8", "replace").decode() if known else None


_NO_RECORD: Row = {
    "media": [],
    "conversations": [],
    "question": "",
    "answer": "",
    "fields": "{}",
    "media_count": 0,
    "media_wanted": None,
    "markers": 0,
    "text_chars": 0,
    "shortest_answer_chars": None,
}


def _record(source: Source, split: str, record: dict[str, Any]) -> Row:
    media = _media(source, record)
    turns = _turns(record)
    texts = [turn["value"] for turn in turns]
    answers = [turn["value"] for turn in turns if turn["from"] == "gpt"]
    own = MARKERS[source.kind]
    return {
        "media": media,
        "conversations": [{**turn, "value": _plain(turn["value"], own)} for turn in turns],
        "question": ANY_MARKER.sub("", texts[0]).strip(),
        "answer": answers[0].strip(),
        "fields": json.dumps(_fields(record), sort_keys=True),
        "media_count": len(media),
        "media_wanted": None if split == "sft" else len(media),
        "markers": sum(_markers(turn, own) for turn in turns),
        "text_chars": sum(map(len, texts)),
        "shortest_answer_chars": min(len(answer.strip()) for answer in answers),
    }


def _media(source: Source, record: dict[str, Any]) -> list[str]:
    """Paths of the record's media. One without any is a record of texts."""
    kind, other = source.kind, "video" if source.kind == "image" else "image"
    if record.get(other) is not None:
        raise _Odd("wrong_kind", f"a record of a source of kind {kind} has the key `{other}`")
    for many in (f"{kind}s", f"{other}s"):
        if many in record:
            raise _Odd("bad_media", f"the key `{many}` is not read: `{kind}` names a path, or a list of paths")
    media = record.get(kind)
    media = [] if media is None else [media] if isinstance(media, str) else media
    if not _is_texts(media):
        raise _Odd("bad_media", f"`{kind}` must be a path or a list of paths, not {_called(record[kind])}")
    return list(media)


_NO_LABEL: Row = {
    "media": None,
    "frame": None,
    "box": None,
    "labels": [],
    "labels_count": None,
    "box_problem": None,
}


def _label(source: Source, split: str, record: dict[str, Any]) -> Row:
    media, box, frame, labels = (record.get(key) for key in (source.kind, "box", "frame", "labels"))
    if not isinstance(media, str):
        raise _Odd("bad_label", f"`{source.kind}` must be the path of a file, not {_called(media)}")
    if not isinstance(labels, list) or not _is_texts(labels):
        raise _Odd("bad_label", "`labels` must be a list of texts")
    if box is not None and not _is_box(box):
        raise _Odd("bad_label", "`box` must be null or four numbers, fractions of width and height")
    whole = isinstance(frame, int) and not isinstance(frame, bool) and 0 <= frame < 2**63
    if not (whole if source.kind == "video" else frame is None):
        raise _Odd("bad_label", "`frame` is the index of a video's frame, and belongs to videos only")
    return {
        "media": media,
        "frame": frame,
        "box": None if box is None else [float(edge) for edge in box],
        "labels": labels,
        "labels_count": len(labels),
        "box_problem": _box_problem(box),
    }


def _fields(record: dict[str, Any]) -> dict[str, str | int | float | bool]:
    """The record's own further fields, as far as they are short: samples can be grouped by them."""
    known = ("id", "image", "video", *TURNS)
    named = (key for key in sorted(record) if key not in known and len(key) <= FIELD_CHARACTERS)
    return {key: record[key] for key in islice((key for key in named if _is_short(record[key])), FIELDS)}


def _is_short(value: Any) -> bool:
    if isinstance(value, str):
        return len(value) <= FIELD_CHARACTERS
    return isinstance(value, (bool, int, float)) and -(2**63) < value < 2**63  # not a number is in no range


def _turns(record: dict[str, Any]) -> list[dict[str, str]]:
    """A conversation: human and gpt by turns, the human first, at least one answer.

    What gpt says before the first question is left out, as the reference does.
    """
    named = [key for key in TURNS if record.get(key) is not None]
    if len(named) != 1:
        raise _Odd("bad_conversation", f"a record has either {' or '.join(f'`{key}`' for key in TURNS)}")
    (key,) = named
    given, (who, what) = record[key], TURNS[key]
    if not isinstance(given, list) or not given:
        raise _Odd("bad_conversation", f"`{key}` must be a list of turns, not {_called(given)}")
    turns = [_turn(turn, f"{key}[{i}]", who, what) for i, turn in enumerate(given)]
    spoken = list(dropwhile(lambda turn: turn["from"] == "gpt", turns))
    for i, turn in enumerate(spoken):
        if turn["from"] != ("human", "gpt")[i % 2]:
            said = "question" if turn["from"] == "human" else "answer"
            raise _Odd("bad_conversation", f"two {said}s follow each other: turn {i + len(turns) - len(spoken)}")
    if not spoken or len(spoken) % 2:
        raise _Odd("bad_conversation", "the last question has no answer" if spoken else "there is no question")
    return spoken


def _turn(turn: Any, where: str, who: str, what: str) -> dict[str, str]:
    if not isinstance(turn, dict):
        raise _Odd("bad_conversation", f"`{where}` must be {{{who}, {what}}}, not {_called(turn)}")
    role, text = turn.get(who), turn.get(what)
    if not isinstance(role, str) or role not in ROLES:
        known = "a system turn is not trained on" if role == "system" else f"must be one of {', '.join(ROLES)}"
        raise _Odd("bad_conversation", f"`{where}.{who}`: {known}")
    if not isinstance(text, str):
        raise _Odd("bad_conversation", f"`{where}.{what}` must be a text, not {_called(text)}")
    return {"from": ROLES[role], "value": text}


def _markers(turn: dict[str, str], own: tuple[str, ...]) -> int:
    """Markers of the source's kind that a human wrote. One in an answer, or of another kind, makes the count wrong."""
    found = ANY_MARKER.findall(turn["value"])
    return len(found) if turn["from"] == "human" and all(marker in own for marker in found) else 1000 * len(found)


def _plain(text: str, own: tuple[str, ...]) -> str:
    """The one spelling of a kind's marker that the model knows."""
    for marker in own[:-1]:
        text = text.replace(marker, own[-1])
    return text


def _is_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _is_box(value: Any) -> bool:
    numbers = isinstance(value, list) and all(type(edge) in (int, float) and abs(edge) < 2**63 for edge in value)
    return numbers and len(value) == 4


def _box_problem(box: list[float] | None) -> str | None:
    if box is None:
        return None
    left, top, right, bottom = box
    return None if 0 <= left < right <= 1 and 0 <= top < bottom <= 1 else "not inside the picture, or empty"


def _called(value: Any) -> str:
    """What kind of JSON value it is, in words."""
    names = {dict: "an object", list: "a list", str: "a text", bool: "true or false", type(None): "null"}
    return "an empty list" if value == [] else names.get(type(value), "a number")
