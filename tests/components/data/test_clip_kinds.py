"""Clips as people have them: the frames that a player shows at the asked times, in validation and in sampling."""

from __future__ import annotations

import gc
import os
import random
from collections.abc import Callable
from datetime import UTC, datetime
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import clips
import numpy as np
import pytest
from PIL import Image

from nvila.components.data import video
from nvila.components.data.demo.clips import encode
from nvila.components.data.media import Limits, MediaError, load_video_frame, load_video_frames, probe, size
from nvila.components.data.sampling import Sampling
from nvila.components.validate.probing import Medium, probe_all

FEW = 8
STEP = 6
"""Frame i of these clips has the gray level 6 * i."""
FINE = {"qmin": "1", "qmax": "1"}


def test_a_few_of_all_kinds(tmp_path: Path) -> None:
    """Prevents other frames than a player's in a kind of clip that no other test names; each day it takes others."""
    seed = int(os.environ.get("CLIPS", datetime.now(UTC).toordinal()))
    bad = []
    for clip in random.Random(seed).sample(clips.clips(seed), FEW):
        path = clips.film(clip, tmp_path / f"clip.{clip.container}", seed)
        bad += [f"{clip.name}: {problem}" for problem in clips.wrong(clip, path, seed)]
    assert not bad, f"python tests/clips.py --seed {seed}: {bad}"


def gray(index: int, side: tuple[int, int] = (64, 64)) -> Image.Image:
    return Image.new("RGB", side, (index * STEP,) * 3)


def write(path: Path, ticks: list[int], *, rate: int = 10, codec: str = "libx264", **container: str) -> Path:
    """A clip whose frame i is shown at ticks[i] / rate seconds."""
    with av.open(str(path), "w", options=container) as file:
        stream: Any = file.add_stream(codec, rate=rate, width=64, height=64, pix_fmt="yuv420p")
        stream.codec_context.gop_size = 8
        stream.options = {"crf": "8", "threads": "1", "bf": "0"} if codec == "libx264" else FINE
        for index, tick in enumerate(ticks):
            frame = av.VideoFrame.from_image(gray(index))
            frame.pts, frame.time_base = tick, Fraction(1, rate)
            file.mux(stream.encode(frame))
        file.mux(stream.encode())
    return path


def seen(path: Path, sampling: Sampling) -> list[int]:
    return [round(float(np.asarray(picture).mean()) / STEP) for picture in load_video_frames(path, sampling)]


def problem(call: Callable[[], Any]) -> MediaError:
    with pytest.raises(MediaError) as caught:
        call()
    return caught.value


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "ts"])
def test_a_rate_is_kept_by_time(tmp_path: Path, suffix: str) -> None:
    """Prevents a screen recording, in which much happens in few seconds, from being sampled as if at one rate."""
    ticks = [0, 10, 20, 30, 40, *range(50, 60)]  # a frame a second for 5 s, then ten
    path = write(tmp_path / f"a.{suffix}", ticks)
    assert seen(path, Sampling(64, 1.0)) == [0, 1, 2, 3, 4, 5]
    assert seen(path, Sampling(64, 2.0)) == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 10]
    assert seen(path, Sampling(3, 0.7)) == [0, 1, 2]
    assert seen(path, Sampling(8)) == [0, 2, 4, 6, 8, 10, 12, 14]


@pytest.mark.parametrize("matrix", clips.ORIENTATIONS)
def test_all_ways_to_hold_a_telephone(tmp_path: Path, matrix: tuple[int, int, int, int]) -> None:
    """Prevents clips that lie on a side or are seen in a mirror, in frames and in sizes."""
    clip = clips.Clip("mp4", "libx264", matrix=matrix, aspect=Fraction(2))
    path = clips.film(clip, tmp_path / "a.mp4")
    assert not [*clips.wrong(clip, path, 0)]
    assert size(path, "video") == ((48, 128) if matrix[1] else (128, 48))


def test_shown_pixels_are_counted(tmp_path: Path) -> None:
    """Prevents a clip of stretched pixels from growing beyond the limit when it is shown."""
    path = clips.film(clips.Clip("mp4", "libx264", aspect=Fraction(2)), tmp_path / "a.mp4")
    just, under = Limits(max_pixels=128 * 48), Limits(max_pixels=128 * 48 - 1)
    assert probe(path, "video", just).width == 128
    for call in (
        lambda: probe(path, "video", under),
        lambda: size(path, "video", under),
        lambda: load_video_frames(path, Sampling(2), under),
    ):
        assert problem(call).problem == "too_large"


@pytest.mark.parametrize("suffix", ["mp4", "avi", "mkv", "webm", "gif", "apng"])
def test_a_clip_that_lost_whole_frames_at_its_end(tmp_path: Path, suffix: str) -> None:
    """Prevents an upload that was cut off between two frames from passing as a shorter clip."""
    path = tmp_path / f"a.{suffix}"
    codec = {"avi": "mpeg4", "webm": "libvpx", "gif": "gif", "apng": "apng"}.get(suffix, "libx264")
    clips.film(clips.Clip(suffix, codec, gop=1 if codec in clips.INTRA else 8), tmp_path / f"whole.{suffix}")
    with (
        av.open(str(tmp_path / f"whole.{suffix}")) as old,
        av.open(str(path), "w", options={"movflags": "faststart"} if suffix == "mp4" else {}) as new,
    ):
        stream = new.add_stream_from_template(old.streams.video[0])
        for packet in old.demux(video=0):
            if packet.size:
                packet.stream = stream
                new.mux(packet)
    with av.open(str(path)) as file:
        ends = [(packet.pos or 0) + packet.size for packet in file.demux(video=0) if packet.size]
    assert probe(path, "video").frames == len(ends) == clips.FRAMES
    path.write_bytes(path.read_bytes()[: ends[20]])
    assert "truncated" in str(problem(lambda: probe(path, "video")))
    assert len(load_video_frames(path, Sampling(3))) == 3


@pytest.mark.parametrize("says", [5, 80])
def test_wrong_counts_in_a_header(tmp_path: Path, says: int) -> None:
    """Prevents frames from being lost, or a whole clip from quarantine, where only the header is wrong."""
    path = write(tmp_path / "a.avi", [*range(40)], codec="mpeg4")
    content = bytearray(path.read_bytes())
    for name, offset in ((b"avih", 24), (b"strh", 40)):
        at = content.index(name) + offset
        assert int.from_bytes(content[at : at + 4], "little") == 40
        content[at : at + 4] = says.to_bytes(4, "little")
    path.write_bytes(content)
    with av.open(str(path)) as file:
        assert file.streams.video[0].frames == says
    assert probe(path, "video").frames == 40
    assert seen(path, Sampling(4)) == [0, 13, 26, 39]


def test_a_header_that_knows_only_the_first_fragment(tmp_path: Path) -> None:
    """Prevents a recording in fragments from being taken for its first."""
    path = write(tmp_path / "a.mp4", [*range(40)], movflags="frag_keyframe")
    with av.open(str(path)) as file:
        assert file.streams.video[0].frames < 40
    assert probe(path, "video").frames == 40
    assert seen(path, Sampling(4)) == [0, 13, 26, 39]


def test_a_cut_by_an_edit_list_is_sought(tmp_path: Path) -> None:
    """Prevents frames before the cut from being shown, and the whole clip from being decoded for some of its frames."""
    clip = clips.Clip("mp4", "libx264", b_frames=2, start="cut")
    path = clips.film(clip, tmp_path / "a.mp4")
    with av.open(str(path)) as file:
        assert sum(packet.is_discard for packet in file.demux(video=0)) > 0
    assert not [*clips.wrong(clip, path, 0)]
    assert clips.sought(path)


@pytest.mark.parametrize(("codec", "bit", "hidden"), [("libvpx", 0x10, {3, 12, 20}), ("libvpx-vp9", 0x02, {8, 16})])
def test_frames_that_are_only_referred_to(tmp_path: Path, codec: str, bit: int, hidden: set[int]) -> None:
    """Prevents hidden frames of VP8 and VP9 from counting: their clips were held to be truncated."""
    whole, path = clips.film(clips.Clip("webm", codec), tmp_path / "whole.webm"), tmp_path / "a.webm"
    with av.open(str(whole)) as old, av.open(str(path), "w") as new:
        stream = new.add_stream_from_template(old.streams.video[0])
        for index, packet in enumerate(packet for packet in old.demux(video=0) if packet.size):
            content = bytearray(packet)
            if index in hidden:
                content[0] &= ~bit  # show_frame
            made = av.Packet(bytes(content))
            made.pts, made.dts, made.time_base = packet.pts, packet.dts, packet.time_base
            made.is_keyframe, made.stream = packet.is_keyframe, stream
            new.mux(made)
    pictures, _ = clips.in_sequence(path)
    assert len(pictures) == probe(path, "video").frames == clips.FRAMES - len(hidden)
    for place, ours in enumerate(load_video_frames(path, Sampling(len(pictures)))):
        assert clips.alike(ours, pictures[place])


def test_a_clip_without_duration(tmp_path: Path) -> None:
    """Prevents what a browser records, whose header knows no end, from being refused."""
    path = write(tmp_path / "a.mkv", [*range(40)], live="1")
    with av.open(str(path)) as file:
        assert file.duration is None
    assert probe(path, "video").seconds == pytest.approx(4.0, abs=0.01)
    assert seen(path, Sampling(64, 1.0)) == [0, 10, 20, 30]
    assert problem(lambda: probe(path, "video", Limits(max_seconds=3.5))).problem == "too_long"


@pytest.mark.parametrize("codec", ["libx264", "libx265"])
@pytest.mark.parametrize("start", ["zero", "cut"])
def test_open_groups_of_pictures(tmp_path: Path, codec: str, start: str) -> None:
    """Prevents grey frames at the edges of groups, and frames that lost what they refer to by a cut from counting."""
    clip = clips.Clip("mkv", codec, b_frames=2, open_groups=True, start=start)
    path = clips.film(clip, tmp_path / "a.mkv")
    assert not [*clips.wrong(clip, path, 0)]


@pytest.mark.parametrize("first", [True, False])
def test_of_several_videos_the_default(tmp_path: Path, first: bool) -> None:
    """Prevents another video of the file, such as a preview, from being sampled instead of the one that is shown."""
    from av.stream import Disposition

    path = tmp_path / "a.mkv"
    with av.open(str(path), "w") as file:
        streams: list[Any] = [file.add_stream("mpeg4", rate=10, width=s, height=s, pix_fmt="yuv420p") for s in (32, 64)]
        for stream in streams:
            stream.options = FINE
        streams[0 if first else 1].disposition = Disposition.default
        streams[1 if first else 0].disposition = Disposition(0)
        for index in range(20):
            for stream in streams:
                file.mux(stream.encode(av.VideoFrame.from_image(gray(index, (stream.width, stream.height)))))
        for stream in streams:
            file.mux(stream.encode())
    assert size(path, "video") == ((32, 32) if first else (64, 64))
    assert seen(path, Sampling(4)) == [0, 6, 13, 19]


def test_a_cover_is_no_clip(tmp_path: Path) -> None:
    """Prevents the picture on a song from being taken for a video, and the one on a clip for its frames."""
    from av.stream import Disposition

    clip, song = tmp_path / "a.mp4", tmp_path / "b.mp4"
    for path in (clip, song):
        with av.open(str(path), "w") as file:
            cover: Any = file.add_stream("png", rate=1, width=32, height=32, pix_fmt="rgb24")
            cover.disposition = Disposition.attached_pic
            if path == clip:
                stream: Any = file.add_stream("libx264", rate=10, width=64, height=64, pix_fmt="yuv420p")
                frames: list[Any] = [av.VideoFrame.from_image(gray(index)) for index in range(20)]
            else:
                stream = file.add_stream("aac", rate=8000, layout="mono")
                frames = [av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")]
                frames[0].rate = 8000
            for one, those in ((cover, [av.VideoFrame.from_image(gray(30, (32, 32)))]), (stream, frames)):
                for frame in [*those, None]:
                    file.mux(one.encode(frame))
    assert size(clip, "video") == (64, 64)
    assert seen(clip, Sampling(4)) == [0, 6, 13, 19]
    with av.open(str(song)) as file:
        assert file.streams.video
    assert "no video" in str(problem(lambda: probe(song, "video")))


@pytest.mark.parametrize("suffix", ["gif", "webp", "png"])
def test_animations(tmp_path: Path, suffix: str) -> None:
    """Prevents animations from being refused, or sampled by number where their frames stay for unequal times."""
    path = tmp_path / f"a.{suffix}"
    steps = [Image.new("RGBA", (40, 30), (60 * index, 0, 0, 255)) for index in range(4)]
    steps[0].paste((0, 0, 0, 0), (0, 0, 20, 30))
    steps[0].putpixel((25, 25), (0, 0, 0, 128))
    waits = [100, 1000, 100, 800]
    options: dict[str, Any] = {"lossless": True} if suffix == "webp" else {"disposal": 2} if suffix == "gif" else {}
    steps[0].save(path, save_all=True, append_images=steps[1:], duration=waits, loop=0, **options)
    found = probe(path, "video")
    assert (found.frames, found.width, found.height, found.seconds) == (4, 40, 30, 2.0)
    assert size(path, "video") == (40, 30)

    def reds(sampling: Sampling) -> list[int]:
        return [round(picture.getpixel((30, 5))[0] / 60) for picture in load_video_frames(path, sampling)]  # type: ignore[index]

    assert reds(Sampling(4)) == [0, 1, 2, 3]
    assert reds(Sampling(64, 2.0)) == [0, 1, 1, 3]
    assert load_video_frame(path, 0).getpixel((5, 5)) == (255, 255, 255)
    assert problem(lambda: load_video_frame(path, 4)).problem == "undecodable"
    assert problem(lambda: probe(path, "video", Limits(max_frames=3))).problem == "too_long"
    assert problem(lambda: load_video_frames(path, Sampling(2), Limits(max_seconds=1.9))).problem == "too_long"
    assert problem(lambda: load_video_frames(path, Sampling(2), Limits(max_pixels=1199))).problem == "too_large"
    path.write_bytes(path.read_bytes()[:-20])
    assert problem(lambda: probe(path, "video")).problem == "undecodable"


def test_times_that_are_alike(tmp_path: Path) -> None:
    """Prevents frames that share a millisecond from hiding each other, or the clip from quarantine."""
    path = write(tmp_path / "a.mkv", [*range(40)], rate=3000)
    assert probe(path, "video").frames == 40
    assert seen(path, Sampling(4)) == [0, 13, 26, 39]


def test_decoding_is_held_against_the_packets(tmp_path: Path) -> None:
    """Prevents a clip from training whose frames sampling would count otherwise than decoding gives them."""
    path = clips.film(clips.Clip("mkv", "mpeg4", b_frames=2, start="cut"), tmp_path / "a.mkv")
    medium = Medium(str(tmp_path), path.name, "video")
    found = probe_all([medium], Limits())[medium]
    assert found.status == "undecodable"
    assert "frames can be decoded where the file says" in found.detail


def test_of_constant_rate_nothing_has_changed(tmp_path: Path) -> None:
    """Prevents clips such as the demonstration's from giving other frames, or other bytes, than plain decoding does."""
    path = tmp_path / "a.mp4"
    noise = np.random.default_rng(0).integers(0, 256, (8, 56, 56, 3), dtype=np.uint8)
    encode(path, [Image.fromarray(pixels) for pixels in noise])
    with av.open(str(path)) as file:
        rate = float(file.streams.video[0].average_rate or 0)
    pictures, _ = clips.in_sequence(path)
    for sampling in (Sampling(8), Sampling(3), Sampling(12), *(Sampling(8, fps) for fps in (0.7, 1.0, 3.0, 4.0, 9.0))):
        ours = load_video_frames(path, sampling)
        places = sampling.places(8, rate)
        assert [np.asarray(o).tobytes() for o in ours] == [np.asarray(pictures[p]).tobytes() for p in places]
    assert clips.sought(path)
    with video._opened(path, Limits()) as clip:
        assert clip.survey().timeline.rate() == rate


def test_frames_are_freed_as_soon_as_they_have_been_looked_at(tmp_path: Path) -> None:
    """Kept for the garbage collector, frames of a large clip fill the memory, and one of them hung a fork."""
    path = write(tmp_path / "clip.mp4", list(range(30)))
    gc.collect()
    gc.disable()
    try:
        before = sum(isinstance(each, av.VideoFrame) for each in gc.get_objects())
        assert probe(path, "video").frames == 30 and len(load_video_frames(path, Sampling(8))) == 8
        left = sum(isinstance(each, av.VideoFrame) for each in gc.get_objects()) - before
    finally:
        gc.enable()
    assert left <= 2, "one of each opening"
