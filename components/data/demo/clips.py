"""`clips`: MP4 files in which four handwritten digits follow one another, with questions for the order."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from nvila.components.contracts.progress import track
from nvila.components.data.demo import handwriting
from nvila.components.data.demo.draft import Draft, Split, cut_short

if TYPE_CHECKING:
    from PIL import Image

SIDE_PIXELS = 56
DIGITS_PER_CLIP = 4
FRAMES_PER_DIGIT = 2
"""The temporal pool of the recipe that uses this source: a pooled frame shows one digit."""
FRAMES_PER_SECOND = 4
TRAINING_CLIPS, HELD_OUT_CLIPS = 2500, 600
LABELLED_FRAMES = 2
"""Labels per training clip, for the step `initialize`."""
ORDINALS = ("first", "second", "third", "fourth")


def build(draft: Draft, scale: float) -> None:
    """Write `scale` of the source: 2,500 training and 600 held-out clips at 1, two questions about each."""
    training, held_out = handwriting.load()
    _clips(draft, "sft", training, max(50, round(TRAINING_CLIPS * scale)))
    _clips(draft, "heldout", held_out, max(20, round(HELD_OUT_CLIPS * scale)))
    _spoil(draft, training)


def _clips(draft: Draft, split: Split, digits: handwriting.Digits, count: int) -> None:
    folder = "videos/heldout" if split == "heldout" else "videos/train"
    (draft.folder / folder).mkdir(parents=True)
    pairs = handwriting.answer_pairs(count, draft.random)
    for index in track(range(count), f"clips: {folder.removeprefix('videos/')} clips"):
        asked = draft.random.sample(range(DIGITS_PER_CLIP), 2)
        shown = _sequence(dict(zip(asked, pairs[index], strict=True)), draft)
        media = f"{folder}/{index:04d}.mp4"
        _film(draft.folder / media, shown, digits, draft)
        for position in asked:
            draft.ask(split, media, f"Which digit is shown {ORDINALS[position]}?", str(shown[position]))
        if split == "sft":
            listed = ", ".join(map(str, shown))
            draft.ask("captions", media, "Describe the video.", f"The digits shown are {listed}")
            for frame in draft.random.sample(range(DIGITS_PER_CLIP * FRAMES_PER_DIGIT), LABELLED_FRAMES):
                draft.label(media, [f"digit {shown[frame // FRAMES_PER_DIGIT]}"], frame=frame)


def _sequence(given: dict[int, int], draft: Draft) -> list[int]:
    """Four digits of which neighbours differ, with the `given` ones (position -> digit, all different) in place."""
    shown = [given.get(position, -1) for position in range(DIGITS_PER_CLIP)]
    for position, digit in enumerate(shown):
        if digit < 0:
            neighbours = shown[max(position - 1, 0) : position + 2]
            shown[position] = draft.random.choice([d for d in range(10) if d not in neighbours])
    return shown


def _film(path: Path, shown: list[int], digits: handwriting.Digits, draft: Draft, **container: str) -> None:
    pictures = [digits.draw(digit, SIDE_PIXELS, draft.random).convert("RGB") for digit in shown]
    encode(path, [picture for picture in pictures for _ in range(FRAMES_PER_DIGIT)], container)


def encode(path: Path, frames: list[Image.Image], container: dict[str, str] | None = None) -> None:
    """Write `frames` as H.264 in MP4, nearly lossless; one thread, so that the bytes are the same every time."""
    import av

    with av.open(str(path), "w", format="mp4", options=container or {}) as file:
        options = {"crf": "12", "preset": "ultrafast", "threads": "1"}
        stream = file.add_stream("libx264", rate=FRAMES_PER_SECOND, options=options)
        stream.width, stream.height = frames[0].size
        stream.pix_fmt = "yuv420p"
        stream.gop_size = FRAMES_PER_DIGIT
        for frame in frames:
            file.mux(stream.encode(av.VideoFrame.from_image(frame)))
        file.mux(stream.encode())


def _spoil(draft: Draft, digits: handwriting.Digits) -> None:
    """Two clips cut short: one loses the index at its end, one keeps the index in front and loses frames."""
    whole = draft.folder / "videos/whole.mp4"
    for name, container in (("broken", {}), ("shortened", {"movflags": "faststart"})):
        _film(whole, [1, 2, 3, 4], digits, draft, **container)
        cut_short(whole, draft.folder / f"videos/{name}.mp4")
        draft.spoil("undecodable", f"videos/{name}.mp4", "Which digit is shown first?", "1")
    whole.unlink()
    draft.spoil_common_ways(".mp4")
