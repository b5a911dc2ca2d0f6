"""Reads a source's annotation files into flat rows; what they say is judged later, by the expectations."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from nvila.components.contracts.errors import DataError
from nvila.components.contracts.recipe.data import LABELS, REQUIRED, SPLITS, Source
from nvila.components.data.layouts import read

MARKERS = {"image": ("<image>",), "video": ("<video>", "<vila/video>")}
"""Placeholders of media in a conversation, by the source's kind; the tables hold the last one of each kind."""
ANY_MARKER = re.compile(r"<image>|<video>|<vila/video>")

FIELDS, FIELD_CHARACTERS = 32, 200
"""Of a record's own fields: how many are kept, the first by name; how long a name or a text may be."""

Row = dict[str, Any]


def annotation_files(source: Source) -> dict[str, Path]:
    """Annotation files of a source by name (`sft`, `captions`, `heldout`, `labels`).

    Raises:
        DataError: a required one is missing.
    """
    found = {}
    for name in (*SPLITS, LABELS):
        path = source.annotation(name).absolute()
        if path.is_file():
            found[name] = path
        elif name in REQUIRED:
            raise DataError(
                f"data source {source.name!r} has no {path.name}",
                where=str(path),
                do="Write it, or correct the source's `path` in the recipe.",
            )
    return found


def read_records(source: Source, split: str, path: Path) -> list[Row]:
    """One row per record of a conversation file, with the measures that the expectations look at.

    Raises:
        DataError: a broken file, or a record without the structure of the format; names file, and line or record.
    """
    records = _each(path, read(path, source.layout))
    return [_record(source, split, index, record, path) for index, record in records]


def read_label_rows(source: Source, path: Path) -> list[Row]:
    """One row per record of `labels.json`.

    Raises:
        DataError: as `read_records`.
    """
    rows = []
    for index, record in _each(path, read(path, source.layout_of(LABELS))):
        where = f"{path}[{index}]"
        media, box, frame = (record.get(key) for key in (source.kind, "box", "frame"))
        labels: Any = record.get("labels")
        _require(isinstance(media, str), f"a label needs the path of its {source.kind}", where, media)
        _require(_is_texts(labels), "`labels` must be a list of texts", where, labels)
        _require(box is None or _is_box(box), "`box` must be null or four fractions", where, box)
        whole = isinstance(frame, int) and not isinstance(frame, bool) and frame >= 0
        right = whole if source.kind == "video" else frame is None
        _require(right, "`frame` is the index of a video's frame, and belongs to videos only", where, frame)
        rows.append(
            {
                "record": f"{source.name}/labels.json[{index}]",
                "id": f"{source.name}/labels/{index}",
                "source": source.name,
                "split": "labels",
                "line": index,
                "root": str(path.parent),
                "media": media,
                "frame": frame,
                "box": None if box is None else [float(edge) for edge in box],
                "labels": labels,
                "labels_count": len(labels),
                "box_problem": _box_problem(box),
            }
        )
    return rows


def _each(path: Path, records: list[Any]) -> Iterator[tuple[int, dict[str, Any]]]:
    """Index and record of each of those that are JSON objects of whole texts, as all must be."""
    for index, record in enumerate(records):
        where = f"{path}[{index}]"
        _require(isinstance(record, dict), "a record must be a JSON object", where, record)
        try:
            json.dumps(record, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise DataError("text with half of a surrogate pair", where=where) from None
        yield index, record


def _record(source: Source, split: str, index: int, record: dict[str, Any], path: Path) -> Row:
    where = f"{path}[{index}]"
    identity = record.get("id")
    given = isinstance(identity, (str, int)) and not isinstance(identity, bool)
    _require(given, "a record needs an `id` (text or whole number)", where, identity)
    other = "video" if source.kind == "image" else "image"
    _require(
        other not in record, f"a record of a source of kind {source.kind} names a {other}", where, record.get(other)
    )
    media = record.get(source.kind, [])
    media = [media] if isinstance(media, str) else media
    _require(_is_texts(media), f"`{source.kind}` must be a path or a list of paths", where, media)
    turns = _turns(record.get("conversations"), where)
    texts = [turn["value"] for turn in turns]
    answers = [turn["value"] for turn in turns if turn["from"] == "gpt"]
    own = MARKERS[source.kind]
    return {
        "record": f"{source.name}/{path.name}[{index}]",
        "id": f"{source.name}/{split}/{identity}",
        "source": source.name,
        "kind": source.kind,
        "split": split,
        "root": str(path.parent),
        "media": media,
        "conversations": [{**turn, "value": _plain(turn["value"], own)} for turn in turns],
        "question": ANY_MARKER.sub("", texts[0]).strip(),
        "answer": answers[0].strip(),
        "fields": json.dumps(_fields(record), sort_keys=True),
        "line": index,
        "media_count": len(media),
        "markers": sum(_markers(turn, own) for turn in turns),
        "text_chars": sum(map(len, texts)),
        "shortest_answer_chars": min(len(answer.strip()) for answer in answers),
    }


def _fields(record: dict[str, Any]) -> dict[str, str | int | float | bool]:
    """The record's own further fields, as far as they are short: samples can be grouped by them."""
    known = ("id", "image", "video", "conversations")
    named = (key for key in sorted(record) if key not in known and len(key) <= FIELD_CHARACTERS)
    return {key: record[key] for key in islice((key for key in named if _is_short(record[key])), FIELDS)}


def _is_short(value: Any) -> bool:
    if isinstance(value, str):
        return len(value) <= FIELD_CHARACTERS
    return isinstance(value, (bool, int, float)) and -(2**63) < value < 2**63  # not a number is in no range


def _turns(turns: Any, where: str) -> list[dict[str, str]]:
    """A conversation: human and gpt by turns, the human first, at least one answer."""
    known = isinstance(turns, list) and all(
        isinstance(turn, dict) and isinstance(turn.get("value"), str) and turn.get("from") in ("human", "gpt")
        for turn in turns
    )
    _require(known, "`conversations` must be a list of {from: human | gpt, value: text}", where, turns)
    roles = [turn["from"] for turn in turns]
    by_turns = len(roles) >= 2 and all(role == ("human", "gpt")[i % 2] for i, role in enumerate(roles))
    _require(by_turns and len(roles) % 2 == 0, "each human turn must be followed by one answer of gpt", where, roles)
    return [{"from": turn["from"], "value": turn["value"]} for turn in turns]


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
    return isinstance(value, list) and len(value) == 4 and all(isinstance(edge, (int, float)) for edge in value)


def _box_problem(box: list[float] | None) -> str | None:
    if box is None:
        return None
    left, top, right, bottom = box
    return None if 0 <= left < right <= 1 and 0 <= top < bottom <= 1 else "not inside the picture, or empty"


def _require(fine: bool, what: str, where: str, value: Any) -> None:
    if not fine:
        raise DataError(what, where=where, value=value)
