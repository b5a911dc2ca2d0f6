"""A source being written: its records, its labels, and the few records that are spoilt on purpose."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any, Literal

Split = Literal["sft", "captions", "heldout"]
Record = dict[str, Any]


class Draft:
    """Collects the records of one source; `write` puts the annotation files into `folder`.

    Args:
        folder: an empty folder; builders write media below it themselves.
        seed: of `random`, which builders use for every choice.
    """

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder = folder
        self.random = random.Random(seed)
        self.spoilt: list[dict[str, str]] = []
        """The records that validation must find: `{"split", "id", "reason"}`."""
        self._records: dict[Split, list[Record]] = {"sft": [], "captions": [], "heldout": []}
        self._labels: list[Record] = []
        self._count = 0

    def ask(self, split: Split, media: str, question: str, answer: str) -> Record:
        """Add one question with its answer about the media file `media` (relative path)."""
        record = self._record(media, question, answer)
        self._records[split].append(record)
        return record

    def label(self, media: str, labels: list[str], *, box: list[float] | None = None, frame: int | None = None) -> None:
        """Say what is to be seen in a training picture, in a part of it, or in one frame of a clip."""
        where = {"image": media} if frame is None else {"video": media, "frame": frame}
        self._labels.append({**where, "box": box, "labels": labels})

    def spoil(self, reason: str, media: str, question: str, answer: str) -> None:
        """Add an SFT record that validation must quarantine for `reason`.

        It goes into the second half of the file: an exact duplicate then follows its original, which stays.
        """
        record = self._record(media, question, answer)
        records = self._records["sft"]
        records.insert(self.random.randrange(len(records) // 2, len(records) + 1), record)
        self.spoilt.append({"split": "sft", "id": record["id"], "reason": reason})

    def spoil_common_ways(self, suffix: str) -> None:
        """Add a missing file, an empty answer and an exact duplicate, made from the first good SFT records."""
        first, second, third = self._records["sft"][:3]
        key, folder = ("image", "images") if "image" in first else ("video", "videos")
        self.spoil("missing_file", f"{folder}/lost{suffix}", *_texts(first))
        self.spoil("empty_answer", second[key], _texts(second)[0], " ")
        copy = f"{folder}/copy{suffix}"
        shutil.copyfile(self.folder / third[key], self.folder / copy)
        self.spoil("duplicate", copy, *_texts(third))

    def write(self) -> dict[str, int]:
        """Write the annotation files and return the number of records in each."""
        contents: list[tuple[str, list[Record]]] = [*self._records.items(), ("labels", self._labels)]
        for name, records in contents:
            text = json.dumps(records, ensure_ascii=False, indent=0) + "\n"
            (self.folder / f"{name}.json").write_text(text, encoding="utf-8")
        return {name: len(records) for name, records in contents}

    def _record(self, media: str, question: str, answer: str) -> Record:
        self._count += 1
        kind = "video" if media.endswith(".mp4") else "image"
        return {
            "id": f"{self._count:06d}",
            kind: media,
            "conversations": [
                {"from": "human", "value": f"<{kind}>\n{question}"},
                {"from": "gpt", "value": answer},
            ],
        }


def cut_short(source: Path, target: Path, share: float = 0.6) -> None:
    """Copy the first part of a file's bytes: what a broken upload leaves."""
    content = source.read_bytes()
    target.write_bytes(content[: int(len(content) * share)])


def _texts(record: Record) -> tuple[str, str]:
    human, gpt = (turn["value"] for turn in record["conversations"][:2])
    return human.partition("\n")[2], gpt
