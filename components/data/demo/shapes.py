"""`shapes`: the pictures, questions and test split of the easy-vqa package; labels and captions read off the pixels."""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections import defaultdict
from pathlib import Path

from nvila.components.contracts.errors import DataError
from nvila.components.contracts.progress import track
from nvila.components.data.demo.draft import Draft, cut_short

QUESTIONS_PER_PICTURE = 4
"""Of about ten that the package asks about each training picture."""
PALETTE = {
    "black": (0, 0, 0),
    "blue": (0, 0, 255),
    "brown": (165, 42, 42),
    "gray": (128, 128, 128),
    "green": (0, 128, 0),
    "red": (255, 0, 0),
    "teal": (0, 128, 128),
    "yellow": (255, 255, 0),
}
"""The package's colours by their CSS names."""


def build(draft: Draft, scale: float) -> None:
    """Write `scale` of the source: 4,000 training and 1,000 held-out pictures at 1."""
    package = package_data()
    training = _questions(package / "train")
    chosen = sorted(draft.random.sample(sorted(training), max(48, round(len(training) * scale))))
    for picture in track(chosen, "shapes: training pictures"):
        media = _copy(package / "train", picture, draft, "images/train")
        shape, colour = look(draft.folder / media)
        asked = training[picture]
        for question, answer in draft.random.sample(asked, min(QUESTIONS_PER_PICTURE, len(asked))):
            draft.ask("sft", media, _sentence(question), answer)
        draft.ask("captions", media, "Describe the picture.", f"a {colour} {shape}")
        draft.label(media, [shape, colour])
    testing = _questions(package / "test")
    for picture in sorted(draft.random.sample(sorted(testing), max(10, round(len(testing) * scale)))):
        media = _copy(package / "test", picture, draft, "images/heldout")
        for question, answer in testing[picture]:
            draft.ask("heldout", media, _sentence(question), answer)
    _spoil(draft, chosen[0])


def package_data() -> Path:
    """Folder of the package's files; importing the package itself is not needed.

    Raises:
        DataError: easy-vqa is not installed.
    """
    spec = importlib.util.find_spec("easy_vqa")
    if spec is None or spec.origin is None:
        raise DataError("the demo source `shapes` needs the package easy-vqa", do="Install easy-vqa==1.0.")
    return Path(spec.origin).parent / "data"


def look(path: Path) -> tuple[str, str]:
    """Shape and colour of the one figure in a picture, from its pixels alone.

    The background is a light gray of slightly varying tint; the figure is one flat colour of the palette. A rectangle
    fills its bounding box, a circle pi/4 of it, a triangle half; small figures gain from their edge pixels.
    """
    import numpy as np
    from PIL import Image

    with Image.open(path) as image:
        pixels = np.asarray(image.convert("RGB")).astype(int)
    background = np.median(pixels.reshape(-1, 3), axis=0)
    figure = np.abs(pixels - background).max(axis=-1) > 60
    rows, columns = np.nonzero(figure)
    box = figure[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
    filled = box.mean()
    shape = "rectangle" if filled > 0.94 else "circle" if filled > 0.72 else "triangle"
    median = np.median(pixels[figure], axis=0)
    colour = min(PALETTE, key=lambda name: float(np.abs(median - PALETTE[name]).sum()))
    return shape, colour


def _questions(folder: Path) -> dict[int, list[tuple[str, str]]]:
    found = defaultdict(list)
    for question, answer, picture in json.loads((folder / "questions.json").read_text(encoding="utf-8")):
        found[picture].append((question, answer))
    return found


def _copy(source: Path, picture: int, draft: Draft, folder: str) -> str:
    media = f"{folder}/{picture:04d}.png"
    (draft.folder / folder).mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source / "images" / f"{picture}.png", draft.folder / media)
    return media


def _sentence(question: str) -> str:
    return question[0].upper() + question[1:]


def _spoil(draft: Draft, picture: int) -> None:
    from PIL import Image

    source = draft.folder / f"images/train/{picture:04d}.png"
    whole, broken = draft.folder / "images/whole.jpg", "images/broken.jpg"
    with Image.open(source) as image:
        image.convert("RGB").save(whole, quality=90)
    cut_short(whole, draft.folder / broken)
    whole.unlink()
    draft.spoil("undecodable", broken, "What color is the shape?", look(source)[1])
    draft.spoil_common_ways(".png")
