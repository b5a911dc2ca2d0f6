"""Frames found by seeking are those of decoding everything, whatever the file is like, and cost a fraction of it."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from nvila.components.data import video
from nvila.components.data.media import Limits, MediaError, load_video_frame, load_video_frames
from nvila.components.data.sampling import Sampling
from nvila.components.data.seek import ranges
from nvila.components.data.survey import Survey

COUNT = 520
"""Two groups of 250 frames and a rest."""


def film(path: Path, keyint: int, *, count: int = COUNT, gaps: bool = False, bframes: int = 0, **options: str) -> Path:
    """A clip whose frames all differ; with `gaps` they stay for unequal times."""
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, (48, 64 + count), dtype=np.uint8)
    container = {"movflags": options.pop("movflags")} if "movflags" in options else {}
    codec = options.pop("codec", "libx264")
    with av.open(str(path), "w", options=container) as file:
        stream = file.add_stream(codec, rate=30, width=64, height=48, pix_fmt="yuv420p")
        stream.codec_context.time_base = Fraction(1, 3000)
        stream.codec_context.gop_size = keyint
        x264 = {"preset": "ultrafast", "bf": str(bframes), "sc_threshold": "0"} if codec == "libx264" else {}
        stream.options = x264 | options
        time = 0
        for index in range(count):
            frame = av.VideoFrame.from_ndarray(np.stack([noise[:, index : index + 64]] * 3, axis=-1))
            frame.pts, frame.time_base = time, Fraction(1, 3000)
            time += int(rng.integers(20, 400)) if gaps else 100
            file.mux(stream.encode(frame))
        file.mux(stream.encode())
    return path


def in_sequence(path: Path) -> list[np.ndarray]:
    """Every frame, decoded from the beginning with nothing of ours."""
    with av.open(str(path)) as file:
        return [frame.to_image() for frame in file.decode(video=0)]


def sought(path: Path, frames: int) -> Any:
    """Only the quick way: None where it gives up."""
    with video._opened(path, Limits()) as clip:
        found = clip.survey()
        return clip.sought(found, Sampling(frames).of(found.timeline), seeking=True)


def from_the_beginning(path: Path, frames: int) -> Any:
    """Only the slow way."""
    return video._in_sequence(path, Sampling(frames).of, Limits(), None)


def survey_of(times: list[int], keys: list[int]) -> Survey:
    shown = sorted(range(len(times)), key=times.__getitem__)
    sizes = [1] * len(times)
    return Survey([*times], sizes, {key: times[key] for key in keys}, shown, sorted(times), 1, False, Fraction(1), ())


def same(ours: Sequence[Any], all_frames: Sequence[Any]) -> bool:
    wanted = [all_frames[index] for index in Sampling(len(ours)).places(len(all_frames))]
    return all(np.array_equal(np.asarray(a), np.asarray(b)) for a, b in zip(ours, wanted, strict=True))


CLIPS: dict[str, tuple[str, int, dict[str, Any]]] = {
    "keyint 60": ("a.mp4", 60, {}),
    "keyint 250": ("a.mp4", 250, {}),
    "b-frames": ("a.mp4", 60, {"bframes": 3}),
    "open groups": ("a.mp4", 60, {"bframes": 3, "x264-params": "open-gop=1:b-pyramid=normal:scenecut=0"}),
    "all key frames": ("a.mp4", 1, {"count": 40}),
    "unequal times": ("a.mp4", 60, {"gaps": True, "bframes": 2}),
    "fragments without an index": ("a.mp4", 60, {"movflags": "frag_keyframe+empty_moov+default_base_moof"}),
    "matroska": ("a.mkv", 60, {"bframes": 2}),
    "transport stream": ("a.ts", 60, {"bframes": 2}),
    "mpeg-4 in avi": ("a.avi", 12, {"codec": "mpeg4"}),
}


@pytest.mark.parametrize("name", CLIPS)
def test_the_frames_are_those_of_decoding_everything(tmp_path: Path, name: str) -> None:
    """Prevents neighbours of the wanted frames, grey frames, or frames out of order after a seek."""
    file, keyint, options = CLIPS[name]
    path = film(tmp_path / file, keyint, **options)
    everything = in_sequence(path)
    for frames in (1, 8, 33):
        assert same(load_video_frames(path, Sampling(frames)), everything), frames
    for index in (0, 1, len(everything) // 2, len(everything) - 1):
        assert np.array_equal(np.asarray(load_video_frame(path, index)), np.asarray(everything[index]))
    if file.endswith(("mp4", "mkv", "ts")) and name != "open groups":
        assert sought(path, 8) is not None, "decoded everything where seeking should do"


def test_only_the_groups_that_are_needed_are_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prevents decoding the whole file in disguise, or the same group once for each of its frames."""
    path = film(tmp_path / "a.mp4", 60)
    with av.open(str(path)) as file:
        packets = [packet for packet in file.demux(video=0) if packet.size]
    keys = [index for index, packet in enumerate(packets) if packet.is_keyframe]
    known = survey_of([packet.pts or 0 for packet in packets], keys)
    assert len(keys) == 9
    assert ranges(known, [5, 70, 3, 75]) == [(0, 5), (60, 75)]
    assert ranges(known, [59, 60]) == [(0, 60)]
    monkeypatch.setattr(video, "_in_sequence", None)
    assert len(load_video_frames(path, Sampling(8))) == 8


def test_a_frame_shown_before_its_key_frame_needs_the_group_before() -> None:
    """Prevents grey pictures at the edges of open groups."""
    found = survey_of([0, 3, 1, 2, 6, 4, 5, 9, 7, 8], [0, 4])
    assert [found.start(position) for position in (3, 4, 5, 7)] == [0, 4, 0, 4]
    assert ranges(found, [5]) == [(0, 5)]
    assert ranges(survey_of([0, 1], [1]), [0]) == [(0, 0)]


@pytest.mark.parametrize("frames", [8, 64])
def test_damage_where_frames_are_wanted(tmp_path: Path, frames: int) -> None:
    """Prevents broken pictures, and another choice of frames than that of decoding from the beginning."""
    path = film(tmp_path / "a.mp4", 60)
    content = bytearray(path.read_bytes())
    with av.open(str(path)) as file:
        packets = [packet for packet in file.demux(video=0) if packet.size]
    wanted = Sampling(frames).places(COUNT)[frames // 2]
    start, size = packets[wanted].pos, packets[wanted].size
    content[start : start + size] = bytes([255]) * size
    path.write_bytes(content)
    assert sought(path, frames) is None
    ours = load_video_frames(path, Sampling(frames))
    expected = from_the_beginning(path, frames)
    assert all(np.array_equal(np.asarray(a), np.asarray(b)) for a, b in zip(ours, expected, strict=True))


def test_a_file_that_ends_early(tmp_path: Path) -> None:
    """Prevents frames beyond the cut from being promised: the choice is made among those that decode."""
    content = film(tmp_path / "a.mp4", 60, movflags="faststart").read_bytes()
    path = tmp_path / "b.mp4"
    path.write_bytes(content[: len(content) * 2 // 3])
    ours = load_video_frames(path, Sampling(8))
    expected = from_the_beginning(path, 8)
    assert all(np.array_equal(np.asarray(a), np.asarray(b)) for a, b in zip(ours, expected, strict=True))


def test_limits_are_kept_without_decoding(tmp_path: Path) -> None:
    """Prevents seeking from passing over the limits of frames and seconds."""
    path = film(tmp_path / "a.mkv", 60, count=100)
    for limits in (Limits(max_frames=99), Limits(max_seconds=3)):
        with pytest.MonkeyPatch.context() as patch, pytest.raises(MediaError, match="more than"):
            patch.setattr(video, "decode_at", None)
            load_video_frames(path, Sampling(2), limits)
