"""Clips of every kind that players show, and whether our frames are those of plain decoding from the beginning.

The whole matrix by hand, `python tests/clips.py`; a few of it by a seed in `test_clip_kinds`. Each clip is made here:
container and codec, distance of key frames, B-frames, constant or variable rate, where its clock begins and whether it
was cut without encoding anew, orientation and shape of its pixels.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import product
from pathlib import Path
from typing import Any

import av
import numpy as np
from PIL import Image

from nvila.components.data import video
from nvila.components.data.media import Limits, load_video_frame, load_video_frames, probe, size
from nvila.components.data.sampling import Sampling

FRAMES, RATE, SIZE, LATE = 30, 30, (64, 48), 7200
QUIET = {
    "libx264": {"preset": "ultrafast", "threads": "1"},
    "libx265": {"preset": "ultrafast", "x265-params": "log-level=none:pools=1"},
    "libsvtav1": {"preset": "12"},
    "libvpx": {"deadline": "realtime", "cpu-used": "8"},
    "libvpx-vp9": {"deadline": "realtime", "cpu-used": "8"},
}
CODECS = {
    "mp4": ("libx264", "libx265", "mpeg4", "libsvtav1", "libvpx-vp9"),
    "fragments.mp4": ("libx264",),
    "mov": ("libx264", "mjpeg", "prores_ks"),
    "mkv": ("libx264", "libx265", "mpeg4", "ffv1"),
    "webm": ("libvpx", "libvpx-vp9"),
    "avi": ("libx264", "mpeg4", "mjpeg"),
    "ts": ("libx264", "libx265", "mpeg2video"),
    "mpg": ("mpeg1video", "mpeg2video"),
    "gif": ("gif",),
    "apng": ("apng",),
}
PIXELS = {"gif": "rgb8", "apng": "rgba", "mjpeg": "yuvj420p", "prores_ks": "yuv422p10le"}
REORDERED = {"libx264", "libx265", "mpeg4", "mpeg1video", "mpeg2video"}
INTRA = {"mjpeg", "prores_ks", "ffv1", "gif", "apng"}
TURNED = {"mp4", "mov", "fragments.mp4"}
LISTED = {"mp4", "mov"}
RECORDED = {"mkv", "ts"}
"""Of the containers: those that hide what is before a cut, and those that are cut anywhere."""
STRETCHED = {"libx264", "libx265", "mpeg4"}
"""Codecs that carry the shape of pixels themselves."""
ORIENTATIONS: dict[tuple[int, int, int, int], Image.Transpose | None] = {
    (1, 0, 0, 1): None,
    (-1, 0, 0, 1): Image.Transpose.FLIP_LEFT_RIGHT,
    (-1, 0, 0, -1): Image.Transpose.ROTATE_180,
    (1, 0, 0, -1): Image.Transpose.FLIP_TOP_BOTTOM,
    (0, 1, 1, 0): Image.Transpose.TRANSPOSE,
    (0, 1, -1, 0): Image.Transpose.ROTATE_270,
    (0, -1, 1, 0): Image.Transpose.ROTATE_90,
    (0, -1, -1, 0): Image.Transpose.TRANSVERSE,
}
"""By the display matrix's a, b, c, d: what that does to a picture."""
ASPECTS = {None: SIZE, Fraction(2): (128, 48), Fraction(1, 2): (64, 96), Fraction(16, 15): (68, 48)}
"""By the shape of pixels: size of the picture before it is turned."""


@dataclass(frozen=True)
class Clip:
    """How a clip is made."""

    container: str
    codec: str
    gop: int = 8
    b_frames: int = 0
    open_groups: bool = False
    rate: str = "constant"
    """constant, broken (30000/1001) or variable."""
    start: str = "zero"
    """zero, late (the clock begins at two hours) or cut (copied from a frame in the middle of a group)."""
    matrix: tuple[int, int, int, int] = (1, 0, 0, 1)
    aspect: Fraction | None = None

    @property
    def name(self) -> str:
        """For messages and `--only`."""
        groups = f"gop{self.gop}/b{self.b_frames}{'o' * self.open_groups}"
        turned = "".join(map(str, self.matrix))
        return f"{self.container}/{self.codec}/{groups}/{self.rate}/{self.start}/{turned}/{self.aspect}"

    @property
    def per_second(self) -> Fraction:
        """Ticks of the times that the encoder is given."""
        return Fraction(30000, 1001) if self.rate == "broken" else Fraction(RATE)


def clips(seed: int) -> list[Clip]:
    """Every sensible combination; orientation and shape are drawn for each."""
    draw = random.Random(seed)
    made = []
    for container, codecs in CODECS.items():
        for codec in codecs:
            groups = [(1, 0, False)] if codec in INTRA else [(8, 0, False), (250, 0, False)]
            groups += [(8, 2, False), (250, 2, False)] if codec in REORDERED else []
            groups += [(8, 2, True)] if codec in ("libx264", "libx265") else []
            starts = ["zero", "late"] if container in ("mp4", "mov", "mkv", "webm", "ts") else ["zero"]
            rates = ["constant", "broken", "variable"]
            if container in ("gif", "apng"):  # GIF rounds every rate of these to hundredths of a second
                rates = ["variable"] if container == "gif" else ["constant", "variable"]
            for group, rate, start in product(groups, rates, [*starts, "cut"]):
                follows = container in RECORDED and group[0] <= 8 and codec != "mpeg4"
                if start == "cut" and container not in LISTED and not follows:
                    continue  # a key frame must follow, and nothing be shown before it, as FFmpeg does of MPEG-4
                if start != "zero" and codec == "libsvtav1":  # PyAV copies none
                    continue
                matrix = draw.choice([*ORIENTATIONS]) if container in TURNED else (1, 0, 0, 1)
                carried = codec in STRETCHED or (container in TURNED and start == "zero")
                aspect = draw.choice([*ASPECTS]) if carried else None
                made.append(Clip(container, codec, *group, rate, start, matrix, aspect))
    return made


def film(clip: Clip, path: Path, seed: int = 0) -> Path:
    """Write a clip of moving noise."""
    rng = np.random.default_rng(seed)
    width, height = SIZE
    blocks = rng.integers(0, 256, (height // 4, width // 4 + FRAMES, 3), dtype=np.uint8)
    noise = np.kron(blocks, np.ones((4, 4, 1), np.uint8))
    fragments = {"movflags": "frag_keyframe+empty_moov+default_base_moof"}
    options = dict(QUIET.get(clip.codec, {}))
    groups = f"open-gop={int(clip.open_groups)}:scenecut=0"
    if clip.codec == "libx264":
        options["x264-params"] = groups
    elif clip.codec == "libx265":
        options["x265-params"] += f":{groups}:keyint={clip.gop}:min-keyint={clip.gop}"
    whole = path.with_name(f"whole-{path.name}") if clip.start != "zero" else path
    with av.open(str(whole), "w", options=fragments if clip.container == "fragments.mp4" else {}) as file:
        stream: Any = file.add_stream(clip.codec, rate=clip.per_second, width=width, height=height)
        stream.pix_fmt = PIXELS.get(clip.codec, "yuv420p")
        stream.codec_context.gop_size = clip.gop
        if clip.codec in REORDERED:
            stream.codec_context.max_b_frames = clip.b_frames
        stream.options = options
        if clip.aspect:
            stream.sample_aspect_ratio = clip.aspect
        if clip.matrix != (1, 0, 0, 1):
            a, b, c, d = (65536 * part for part in clip.matrix)
            stream.set_display_matrix([a, b, 0, c, d, 0, 0, 0, 1 << 30])
        tick = 0
        for index in range(FRAMES):
            pixels = np.ascontiguousarray(noise[:, 4 * index : 4 * index + width])
            frame = av.VideoFrame.from_ndarray(pixels).reformat(format=stream.pix_fmt)
            frame.pts, frame.time_base = tick, 1 / clip.per_second
            tick += int(rng.integers(1, 6)) if clip.rate == "variable" else 1
            file.mux(stream.encode(frame))
        file.mux(stream.encode())
    if clip.start != "zero":
        copy(whole, path, late=clip.start == "late")
        whole.unlink()
    return path


def copy(whole: Path, path: Path, *, late: bool) -> None:
    """Without encoding anew: with the clock two hours later, or from a frame in the middle of a group on.

    The second is what `-ss` and `-c copy` do: MP4 keeps the group from its key frame on and hides what comes before the
    cut by an edit list; of the others the beginning of the group is dropped here, as recorders of broadcasts do.
    """
    options = {"avoid_negative_ts": "disabled"} | ({"mpegts_copyts": "1"} if path.suffix == ".ts" else {})
    listed = path.suffix[1:] in LISTED
    with av.open(str(whole)) as source, av.open(str(path), "w", options=options) as file:
        stream = source.streams.video[0]
        target = file.add_stream_from_template(stream)
        packets = [packet for packet in source.demux(stream) if packet.size]
        shown = sorted(packet.pts or 0 for packet in packets)
        shift = int(LATE / (stream.time_base or 1)) if late else -shown[FRAMES // 3 + 2] if listed else 0
        if not late and not listed:
            packets = packets[FRAMES // 3 :]
        for packet in packets:
            packet.pts = None if packet.pts is None else packet.pts + shift
            packet.dts = None if packet.dts is None else packet.dts + shift
            packet.stream = target
            file.mux(packet)


def in_sequence(path: Path) -> tuple[list[Image.Image], list[float | None]]:
    """Every frame, decoded from the beginning with nothing of ours, and when it is shown."""
    with av.open(str(path)) as file:
        frames = [*file.decode(video=0)]
    clear = any(part.is_alpha for part in frames[0].format.components)
    pictures = [Image.fromarray(frame.to_ndarray(format="rgba")) if clear else frame.to_image() for frame in frames]
    if clear:
        pictures = [Image.alpha_composite(Image.new("RGBA", p.size, "white"), p).convert("RGB") for p in pictures]
    return pictures, [frame.time for frame in frames]


def expected(clip: Clip, path: Path) -> tuple[list[Image.Image], list[float]]:
    """The frames as a player shows them, and their seconds from the first on."""
    pictures, times = in_sequence(path)
    shape, turn = ASPECTS[clip.aspect], ORIENTATIONS[clip.matrix]
    if clip.aspect:
        pictures = [picture.resize(shape, Image.Resampling.BICUBIC) for picture in pictures]
    if turn is not None:
        pictures = [picture.transpose(turn) for picture in pictures]
    seconds = sorted(time for time in times if time is not None)
    return pictures, [time - seconds[0] for time in seconds]


def at_rate(clip: Clip, times: Sequence[float], fps: float, most: int) -> list[int]:
    """Places of the frames at 0, 1 / fps, 2 / fps, ... seconds."""
    if clip.rate != "variable":
        rate = float(clip.per_second)
        asked = np.arange(0, len(times) / rate, 1 / fps)[:most]
        return [int(time * rate) for time in asked]
    asked = [k / fps for k in range(most) if k / fps <= times[-1]]
    return [max(place for place, time in enumerate(times) if time <= at + 1e-6) for at in asked]


def wrong(clip: Clip, path: Path, seed: int) -> Iterator[str]:
    """What is not as a player shows it."""
    draw = random.Random(seed)
    pictures, times = expected(clip, path)
    least = FRAMES // 3 if clip.start == "cut" else FRAMES
    if len(pictures) < least or len(times) != len(pictures):
        yield f"made {len(pictures)} frames of which {len(times)} have times"
    found = probe(path, "video")
    if (found.frames, found.width, found.height) != (len(pictures), *pictures[0].size):
        yield f"probe says {found}, and it is {len(pictures)} of {pictures[0].size}"
    if size(path, "video") != pictures[0].size:
        yield f"size says {size(path, 'video')}, and it is {pictures[0].size}"
    count = draw.choice([1, 3, 5, FRAMES, 40])
    fps = draw.choice([1.0, 3.0, 7.5, 10.0])
    most = draw.choice([3, 64])
    for sampling, places in (
        (Sampling(count), np.linspace(0, len(pictures) - 1, count).round().astype(int).tolist()),
        (Sampling(most, fps), at_rate(clip, times, fps, most)),
    ):
        ours = load_video_frames(path, sampling)
        if sampling.fps and clip.rate == "variable":
            ours = ours[: len(places)]  # how long the last frame stays is the file's to say
        if len(ours) != len(places):
            yield f"{sampling}: {len(ours)} frames instead of {len(places)}"
            continue
        if not all(alike(picture, pictures[place]) for picture, place in zip(ours, places, strict=True)):
            seen = [next((n for n, known in enumerate(pictures) if alike(known, picture)), None) for picture in ours]
            yield f"{sampling}: {seen} instead of {places}"
    index = draw.randrange(len(pictures))
    if not alike(load_video_frame(path, index), pictures[index]):
        yield f"frame {index} is another"


def alike(one: Image.Image, other: Image.Image) -> bool:
    """To the last pixel."""
    return np.array_equal(np.asarray(one), np.asarray(other))


def sought(path: Path) -> bool:
    """Whether 3 frames are found by seeking."""
    with video._opened(path, Limits()) as clip:
        found = clip.survey()
        return clip.sought(found, Sampling(3).of(found.timeline), seeking=True) is not None


def main() -> int:
    """Make and check the matrix; print what is wrong, and in how many of each container seeking was enough."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="clips whose name holds this")
    options = parser.parse_args()
    chosen = [clip for clip in clips(options.seed) if options.only in clip.name]
    bad, quick, all_of = 0, Counter[str](), Counter[str]()
    with tempfile.TemporaryDirectory() as folder:
        for clip in chosen:
            path = Path(folder, f"clip.{clip.container}")
            try:
                film(clip, path, options.seed)
                problems = [*wrong(clip, path, options.seed)]
                quick[clip.container] += sought(path)
            except Exception as error:
                problems = [f"{type(error).__name__}: {error}"]
            all_of[clip.container] += 1
            bad += bool(problems)
            for problem in problems:
                print(f"{clip.name}: {problem}".replace(folder, ""), flush=True)
    by_seeking = {name: f"{quick[name]} of {number}" for name, number in all_of.items()}
    print({"seed": options.seed, "clips": len(chosen), "wrong": bad, "by seeking": by_seeking})
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
