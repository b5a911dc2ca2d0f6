"""Pictures and clips, embedded; and sample predictions with theirs, some right and some wrong, always the same ones."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nvila.components.contracts.errors import DataError
from nvila.components.contracts.results.accuracy import Evaluation
from nvila.components.contracts.steps import EVALUATE, EVALUATE_QUANTIZED, VALIDATE
from nvila.components.runner.status import Run

if TYPE_CHECKING:
    from PIL.Image import Image

    from nvila.components.data.media import Limits

RIGHT_PER_SOURCE, WRONG_PER_SOURCE = 3, 3
CLIP_FRAMES = 6
CLIP_SUFFIXES = (".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".ts", ".3gp", ".apng", ".gif")
PIXEL_ART = 96
"""Pictures no larger than this are embedded as they are and shown enlarged without smoothing."""
LARGEST = 320


@dataclass(frozen=True)
class Picture:
    """What a sample shows."""

    uri: str | None
    """Its data; None where the file cannot be read any more."""
    wide: bool
    """A strip of frames or pictures rather than one."""
    pixelated: bool
    """So small that it is shown pixel by pixel."""


@dataclass(frozen=True)
class Card:
    """One answered question."""

    question: str
    answer: str
    prediction: str
    quantized: str | None
    correct: bool
    picture: Picture


def cards(run: Run) -> dict[str, list[Card]]:
    """Per source, right answers then wrong ones, spread evenly over the held-out questions."""
    rows = sorted(table(run.file(EVALUATE, "predictions.parquet")), key=lambda row: row["id"])
    after = {row["id"]: row["prediction"] for row in table(run.file(EVALUATE_QUANTIZED, "predictions.parquet"))}
    limits = limits_of(run)
    found = {}
    evaluation = run.result(Evaluation)
    for source in evaluation.accuracy if evaluation else ():
        mine = [row for row in rows if row["source"] == source]
        chosen = _spread([row for row in mine if row["correct"]], RIGHT_PER_SOURCE)
        chosen += _spread([row for row in mine if not row["correct"]], WRONG_PER_SOURCE)
        found[source] = [_card(row, after.get(row["id"]), limits) for row in chosen]
    return {source: some for source, some in found.items() if some}


def table(path: Path | None) -> list[dict[str, Any]]:
    """Rows of a Parquet file, none where there is no file."""
    if path is None:
        return []
    import pyarrow.parquet as parquet

    return parquet.read_table(path).to_pylist()


def _spread(rows: Sequence[Mapping[str, Any]], count: int) -> list[Mapping[str, Any]]:
    if len(rows) <= count:
        return list(rows)
    return [rows[(2 * i + 1) * len(rows) // (2 * count)] for i in range(count)]


def limits_of(run: Run) -> Limits:
    """What the run's media may be; a table that is gone or damaged says nothing of it."""
    from nvila.components.data.media import Limits
    from nvila.components.data.samples import SAMPLES_FILE, read_limits

    samples = run.file(VALIDATE, SAMPLES_FILE)
    try:
        return read_limits(samples) if samples else Limits()
    except DataError:
        return Limits()


def picture(paths: Sequence[Path], limits: Limits) -> Picture:
    """A picture, the first of several, or a clip's frames: a few, and small, whatever lies there."""
    from nvila.components.data.media import load_image, load_video_frames
    from nvila.components.data.sampling import Sampling

    clip = len(paths) == 1 and (paths[0].suffix.lower() in CLIP_SUFFIXES or paths[0].is_dir())
    wide = clip or len(paths) > 1
    try:
        if clip:
            images = [*load_video_frames(paths[0], Sampling(CLIP_FRAMES), limits)]
        else:
            images = [load_image(path, limits) for path in paths[:CLIP_FRAMES]]
    except (DataError, OSError):
        images = []
    if not images:
        return Picture(None, wide, False)
    limit = LARGEST if len(images) == 1 else LARGEST // 2
    small = max(max(image.size) for image in images) <= PIXEL_ART
    for image in images:
        image.thumbnail((limit, limit))
    return Picture(_data_uri(_strip(images), lossless=small), wide, small)


def _card(row: Mapping[str, Any], quantized: str | None, limits: Limits) -> Card:
    paths = [Path(row.get("root") or "", name) for name in row.get("media") or []]
    return Card(
        question=row["question"],
        answer=row["answer"],
        prediction=row["prediction"],
        quantized=quantized,
        correct=bool(row["correct"]),
        picture=picture(paths, limits),
    )


def _strip(images: list[Image]) -> Image:
    """Pictures side by side with a gap of 2 pixels."""
    from PIL import Image as Pictures

    if len(images) == 1:
        return images[0]
    width = sum(image.width for image in images) + 2 * (len(images) - 1)
    strip = Pictures.new("RGB", (width, max(image.height for image in images)), (127, 127, 127))
    at = 0
    for image in images:
        strip.paste(image, (at, 0))
        at += image.width + 2
    return strip


def _data_uri(image: Image, *, lossless: bool) -> str:
    stream = io.BytesIO()
    kind = "png" if lossless else "jpeg"
    image.convert("RGB").save(stream, kind.upper(), **({} if lossless else {"quality": 80}))
    return f"data:image/{kind};base64,{base64.b64encode(stream.getvalue()).decode()}"
