"""Frames of a long clip, beside decoding it from its beginning."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from model_rows.measure import Measured
from PIL import Image

from nvila.components.data.media import load_video_frames
from nvila.components.data.sampling import Sampling

SECONDS, FRAMES_PER_SECOND, SIZE = 600, 30, (320, 180)
AT_LEAST = {(8, 60): 10.0, (8, 250): 10.0, (64, 60): 5.0, (64, 250): 1.7}
"""By frames and distance of key frames."""
CUT_SECONDS = 1.3
"""Hidden by an edit list in a third clip, which is copied from the first."""


def rows() -> Iterator[Measured]:
    """8 and 64 frames of clips with a key frame every 2 and every 8 seconds, and of one with an edit list."""
    with tempfile.TemporaryDirectory() as folder:
        for keyint, cut in ((60, False), (60, True), (250, False)):
            path, count = Path(folder, f"{keyint}.mp4"), SECONDS * FRAMES_PER_SECOND
            if cut:
                path, count = _cut(path), count - round(CUT_SECONDS * FRAMES_PER_SECOND)
            else:
                _film(path, keyint)
            for frames in (8, 64):
                began = time.perf_counter()
                expected = _sequential(path, frames, count)
                middle = time.perf_counter()
                found = load_video_frames(path, Sampling(frames))
                ended = time.perf_counter()
                assert all(np.array_equal(np.asarray(a), np.asarray(b)) for a, b in zip(expected, found, strict=True))
                work = f"{frames} frames of 10 minutes, keyint {keyint}{', cut by an edit list' * cut}"
                taken = (middle - began, ended - middle)
                yield work, "s", *taken, "decoding from the beginning; frames equal", AT_LEAST[frames, keyint]


def _film(path: Path, keyint: int) -> None:
    """Ten minutes that move, at a low resolution."""
    import av

    width, height = SIZE
    noise = np.random.default_rng(0).integers(0, 256, (height // 10, width // 10 + 64, 3), dtype=np.uint8)
    wide = np.kron(noise, np.ones((10, 10, 1), dtype=np.uint8))
    with av.open(str(path), "w") as file:
        stream: Any = file.add_stream("libx264", rate=FRAMES_PER_SECOND, width=width, height=height)
        stream.pix_fmt = "yuv420p"
        stream.options = {"preset": "ultrafast", "g": str(keyint), "keyint_min": str(keyint), "sc_threshold": "0"}
        shifts = [
            av.VideoFrame.from_ndarray(np.ascontiguousarray(wide[:, s : s + width])).reformat(format="yuv420p")
            for s in range(0, 600, 5)
        ]
        for index in range(SECONDS * FRAMES_PER_SECOND):
            frame = shifts[index % len(shifts)]
            frame.pts = index
            file.mux(stream.encode(frame))
        file.mux(stream.encode())


def _cut(whole: Path) -> Path:
    """As `ffmpeg -ss SECONDS -c copy`."""
    import av

    path = whole.with_name(f"cut-{whole.name}")
    with av.open(str(whole)) as source, av.open(str(path), "w", options={"avoid_negative_ts": "disabled"}) as file:
        stream = source.streams.video[0]
        target, shift = file.add_stream_from_template(stream), round(CUT_SECONDS / (stream.time_base or 1))
        for packet in source.demux(stream):
            if packet.pts is not None and packet.dts is not None:
                packet.pts, packet.dts, packet.stream = packet.pts - shift, packet.dts - shift, target
                file.mux(packet)
    return path


def _sequential(path: Path, frames: int, count: int) -> list[Image.Image]:
    import av

    with av.open(str(path)) as file:
        file.streams.video[0].thread_type = "NONE"
        wanted = Sampling(frames).places(count)
        kept = {i: f.to_image() for i, f in enumerate(file.decode(video=0)) if i in set(wanted)}
    return [kept[index] for index in wanted]
