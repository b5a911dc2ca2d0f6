"""`digits`: 2x2 grids of real handwritten digits, with questions for the digit in one cell."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nvila.components.contracts.progress import track
from nvila.components.data.demo import handwriting
from nvila.components.data.demo.draft import Draft, Split, cut_short

if TYPE_CHECKING:
    from PIL import Image

CELL_PIXELS = 28
"""A picture is 2x2 cells, so that cells align with the halves of the picture, as the tiles of the second scale do."""
TRAINING_GRIDS, HELD_OUT_GRIDS = 6000, 600
CELLS = ((0, 0), (0, 1), (1, 0), (1, 1))


def build(draft: Draft, scale: float) -> None:
    """Write `scale` of the source: 6,000 training and 600 held-out grids at 1, two questions about each."""
    training, held_out = handwriting.load()
    _grids(draft, "sft", training, max(60, round(TRAINING_GRIDS * scale)))
    _grids(draft, "heldout", held_out, max(20, round(HELD_OUT_GRIDS * scale)))
    _spoil(draft, training)


def _grids(draft: Draft, split: Split, digits: handwriting.Digits, count: int) -> None:
    folder = "images/heldout" if split == "heldout" else "images/train"
    (draft.folder / folder).mkdir(parents=True)
    pairs = handwriting.answer_pairs(count, draft.random)
    for index in track(range(count), f"digits: {folder.removeprefix('images/')} grids"):
        asked = draft.random.sample(range(4), 2)
        grid = [draft.random.randrange(10) for _ in CELLS]
        for cell, answer in zip(asked, pairs[index], strict=True):
            grid[cell] = answer
        media = f"{folder}/{index:04d}.png"
        _picture(grid, digits, draft).save(draft.folder / media)
        for cell in asked:
            row, column = CELLS[cell]
            question = f"Which digit is in row {row + 1}, column {column + 1}?"
            draft.ask(split, media, question, str(grid[cell]))
        if split == "sft":
            _describe(draft, media, grid)


def _describe(draft: Draft, media: str, grid: list[int]) -> None:
    """Caption and labels of a training grid."""
    a, b, c, d = grid
    draft.ask("captions", media, "Describe the picture.", f"row 1: {a} {b}, row 2: {c} {d}")
    for (row, column), digit in zip(CELLS, grid, strict=True):
        box = [column / 2, row / 2, (column + 1) / 2, (row + 1) / 2]
        draft.label(media, [f"digit {digit}"], box=box)
    draft.label(media, [f"row {r + 1} column {c + 1}: {d}" for (r, c), d in zip(CELLS, grid, strict=True)])


def _picture(grid: list[int], digits: handwriting.Digits, draft: Draft) -> Image.Image:
    from PIL import Image

    picture = Image.new("L", (2 * CELL_PIXELS, 2 * CELL_PIXELS))
    for (row, column), digit in zip(CELLS, grid, strict=True):
        picture.paste(digits.draw(digit, CELL_PIXELS, draft.random), (column * CELL_PIXELS, row * CELL_PIXELS))
    return picture.convert("RGB")


def _spoil(draft: Draft, digits: handwriting.Digits) -> None:
    whole, broken = draft.folder / "images/whole.jpg", "images/broken.jpg"
    _picture([1, 2, 3, 4], digits, draft).save(whole, quality=90)
    cut_short(whole, draft.folder / broken)
    whole.unlink()
    draft.spoil("undecodable", broken, "Which digit is in row 1, column 1?", "1")
    draft.spoil_common_ways(".png")
