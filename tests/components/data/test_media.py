"""Media from strangers: what decodes comes out right, what does not is named and costs nothing."""

from __future__ import annotations

import io
import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image

from nvila.components.contracts.errors import DataError
from nvila.components.data.demo.clips import encode
from nvila.components.data.media import (
    Limits,
    MediaError,
    inside,
    load_image,
    load_video_frames,
    probe,
)
from nvila.components.data.sampling import Sampling

RED, WHITE = (255, 0, 0), (255, 255, 255)


def gray(level: int, size: tuple[int, int] = (32, 32)) -> Image.Image:
    return Image.new("RGB", size, (level, level, level))


def clip(path: Path, count: int = 8, **container: str) -> Path:
    """A clip whose frame i has the gray level 25 * i."""
    encode(path, [gray(25 * index) for index in range(count)], dict(container))
    return path


def level(image: Image.Image) -> int:
    return round(float(np.asarray(image).mean()) / 25)


def problem(call: Callable[[], Any]) -> str:
    with pytest.raises(MediaError) as caught:
        call()
    assert isinstance(caught.value, DataError)
    return caught.value.problem


def png_header(width: int, height: int) -> bytes:
    """A PNG that promises a picture of this size and holds no pixels."""
    chunks = ((b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)), (b"IDAT", zlib.compress(b"")))
    written = (
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body)) for name, body in chunks
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(written)


def test_exif_rotation_is_applied(tmp_path: Path) -> None:
    """Prevents telephone pictures from being trained on sideways."""
    image = Image.new("RGB", (40, 20), "black")
    image.paste(WHITE, (0, 0, 20, 20))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned 90 degrees clockwise: left becomes top
    image.save(tmp_path / "a.jpg", exif=exif, quality=95)
    loaded = load_image(tmp_path / "a.jpg")
    assert loaded.size == (20, 40)
    assert loaded.getpixel((10, 3))[0] > 200 and loaded.getpixel((10, 36))[0] < 50


def test_transparency_lies_over_white(tmp_path: Path) -> None:
    """Prevents the hidden colours of transparent pixels from showing."""
    image = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
    image.putpixel((0, 0), (*RED, 255))
    image.save(tmp_path / "a.png")
    loaded = load_image(tmp_path / "a.png")
    assert loaded.mode == "RGB" and loaded.getpixel((0, 0)) == RED and loaded.getpixel((5, 5)) == WHITE


def test_palettes_and_their_transparent_entry(tmp_path: Path) -> None:
    """Prevents palette indices from being read as gray levels, and the transparent entry from being shown."""
    image = Image.new("P", (8, 8), 0)
    image.putpalette([0, 255, 0, *RED])
    image.putpixel((3, 3), 1)
    image.save(tmp_path / "a.png", transparency=0)
    loaded = load_image(tmp_path / "a.png")
    assert loaded.getpixel((3, 3)) == RED and loaded.getpixel((0, 0)) == WHITE


def test_sixteen_bit_gray_is_scaled_not_clipped(tmp_path: Path) -> None:
    """Prevents medical and scientific pictures from turning all white."""
    Image.fromarray(np.full((8, 8), 0x8080, np.uint16)).save(tmp_path / "a.png")
    assert load_image(tmp_path / "a.png").getpixel((0, 0)) == (128, 128, 128)


def test_cmyk_becomes_the_same_colour(tmp_path: Path) -> None:
    """Prevents print pictures from coming out as negatives."""
    Image.new("RGB", (16, 16), RED).convert("CMYK").save(tmp_path / "a.jpg", quality=95)
    red, green, blue = load_image(tmp_path / "a.jpg").getpixel((8, 8))
    assert red > 240 and green < 15 and blue < 15


def test_an_animation_gives_its_first_frame(tmp_path: Path) -> None:
    """Prevents an animated picture from giving a later frame, or many."""
    gray(0).save(tmp_path / "a.gif", save_all=True, append_images=[gray(200), gray(250)])
    assert load_image(tmp_path / "a.gif").getpixel((0, 0)) == (0, 0, 0)


def test_pixels_without_colours_are_refused(tmp_path: Path) -> None:
    """Prevents floating-point rasters from being shown with invented brightness."""
    Image.fromarray(np.full((8, 8), 0.5, np.float32)).save(tmp_path / "a.tiff")
    assert problem(lambda: load_image(tmp_path / "a.tiff")) == "undecodable"


def test_huge_pictures_are_refused_by_their_header(tmp_path: Path) -> None:
    """Prevents a small file that promises a huge picture from filling memory."""
    (tmp_path / "a.png").write_bytes(png_header(60_000, 60_000))
    (tmp_path / "b.png").write_bytes(png_header(300, 300))
    assert problem(lambda: load_image(tmp_path / "b.png", Limits(max_pixels=80_000))) == "too_large"
    assert problem(lambda: load_image(tmp_path / "a.png")) == "too_large"
    assert problem(lambda: load_image(tmp_path / "a.png", Limits(max_pixels=10**12))) == "too_large"


def test_large_files_are_not_opened(tmp_path: Path) -> None:
    """Prevents reading files beyond the limit of bytes."""
    gray(5).save(tmp_path / "a.png")
    clip(tmp_path / "a.mp4")
    small = Limits(max_bytes=20)
    assert problem(lambda: load_image(tmp_path / "a.png", small)) == "too_large"
    assert problem(lambda: load_video_frames(tmp_path / "a.mp4", Sampling(8), small)) == "too_large"


@pytest.mark.parametrize("suffix", ["jpg", "png", "gif", "webp", "tiff", "bmp"])
def test_truncated_pictures_are_refused(tmp_path: Path, suffix: str) -> None:
    """Prevents half pictures (gray below the break) from being trained on, in each format."""
    rng = np.random.default_rng(0)
    buffer = io.BytesIO()
    Image.fromarray(rng.integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(
        buffer, format={"jpg": "JPEG", "tiff": "TIFF"}.get(suffix, suffix)
    )
    whole = tmp_path / f"whole.{suffix}"
    whole.write_bytes(buffer.getvalue())
    assert load_image(whole).size == (64, 64)
    broken = tmp_path / f"broken.{suffix}"
    broken.write_bytes(buffer.getvalue()[: len(buffer.getvalue()) // 2])
    assert problem(lambda: load_image(broken)) == "undecodable"


def test_other_formats_are_not_tried(tmp_path: Path) -> None:
    """Prevents PostScript, which Pillow hands to an interpreter, from being opened under a picture's name."""
    gray(5).save(tmp_path / "a.eps")
    (tmp_path / "a.eps").rename(tmp_path / "a.png")
    (tmp_path / "b.jpg").write_bytes(b"hello")
    (tmp_path / "c.jpg").write_bytes(b"")
    for name in ("a.png", "b.jpg", "c.jpg"):
        assert problem(lambda name=name: load_image(tmp_path / name)) == "undecodable"


def test_missing_and_special_files(tmp_path: Path) -> None:
    """Prevents a pipe under a picture's name from hanging the reader."""
    os.mkfifo(tmp_path / "pipe.png")
    for name in ("nothing.png", "pipe.png"):
        assert problem(lambda name=name: load_image(tmp_path / name)) == "missing_file"


def test_paths_stay_inside_the_source(tmp_path: Path) -> None:
    """Prevents a record from naming any file of the machine, directly or through a link."""
    root = tmp_path / "source"
    root.mkdir()
    gray(1).save(tmp_path / "secret.png")
    gray(2).save(root / "fine.png")
    (root / "link.png").symlink_to(tmp_path / "secret.png")
    (root / "folder").symlink_to(tmp_path)
    (root / "alias.png").symlink_to("fine.png")
    assert load_image(inside(root, "fine.png")).getpixel((0, 0)) == (2, 2, 2)
    assert inside(root, "alias.png") == root / "alias.png"
    for name in (
        "../secret.png",
        "a/../../secret.png",
        str(tmp_path / "secret.png"),
        "link.png",
        "folder/secret.png",
        "https://example.com/a.png",
        "file:///etc/passwd",
        "a\0b.png",
    ):
        assert problem(lambda name=name: inside(root, name)) == "outside_source", name
    (root / "round.png").symlink_to("round.png")
    for name in ("round.png", "n" * 300):
        assert problem(lambda name=name: inside(root, name)) == "missing_file", name


def test_sampling_follows_the_specification() -> None:
    """Prevents training and serving from looking at other frames than the reference does."""
    halves = [(30, 15), (116, 15), (226, 15), (252, 15), (254, 15)]  # a last bit decides where these round to
    many = [(count, frames) for frames in (2, 7, 8, 29, 64, 256) for count in range(1, 400)]
    for count, frames in [(8, 8), (100, 8), (3, 8), (1, 4), (300, 256), (9, 1), *halves, *many]:
        assert Sampling(frames).places(count) == np.linspace(0, count - 1, frames).round().astype(int).tolist()


def test_frames_of_a_clip(tmp_path: Path) -> None:
    """Prevents frames out of order, of the wrong place, or too few for a short clip."""
    path = clip(tmp_path / "a.mp4")
    assert [level(frame) for frame in load_video_frames(path, Sampling(8))] == list(range(8))
    assert [level(frame) for frame in load_video_frames(path, Sampling(3))] == [0, 4, 7]
    assert len(load_video_frames(path, Sampling(12))) == 12
    found = probe(path, "video")
    assert (found.frames, found.width, found.height) == (8, 32, 32)


@pytest.mark.parametrize(("fps", "most", "expected"), [(2.0, 8, [0, 2, 4, 6]), (2.0, 3, [0, 2, 4]), (3.0, 8, None)])
def test_frames_at_a_rate(tmp_path: Path, fps: float, most: int, expected: list[int] | None) -> None:
    """Prevents a checkpoint that samples at a rate from seeing frames at other times, or beyond the end."""
    path = clip(tmp_path / "a.mp4")
    with av.open(str(path)) as container:
        rate = float(container.streams.video[0].average_rate or 0)
    scaled = fps * rate / 4  # as if the clip had 4 frames per second
    times = np.arange(0, 8 / rate, 1 / scaled)[:most]
    wanted = [int(time * rate) for time in times]
    assert expected is None or wanted == expected
    assert [level(frame) for frame in load_video_frames(path, Sampling(most, scaled))] == wanted


def test_places_at_a_rate_are_numpy_s() -> None:
    """Prevents frames that are off by one from the reference's int(t * rate) for t in arange(0, seconds, 1 / fps)."""
    rng = np.random.default_rng(0)
    rates = [24.0, 25.0, 30.0, 60.0, 30000 / 1001, 24000 / 1001, 10.0]
    for _ in range(5000):
        rate = float(rng.choice([*rates, rng.uniform(1, 120)]))
        fps = float(rng.choice([0.1, 0.2, 0.3, 0.7, 1.0, 1.5, 3.0, 7.0, 10.0, 24.0, rate, rng.uniform(0.05, 60)]))
        count, most = int(rng.integers(1, 3000)), int(rng.choice([1, 8, 64, 256]))
        times = np.arange(0, count / rate, 1.0 / fps)[:most]
        wanted = [place for time in times if (place := int(time * rate)) < count]
        assert Sampling(most, fps).places(count, rate) == wanted, (count, most, fps, rate)
    assert Sampling(8, 2.0).places(0, 25.0) == []
    assert Sampling(8, 1e-320).places(3, 25.0) == np.arange(0, 3 / 25, np.inf).tolist() == [0]
    assert len(Sampling(8, 1e300).places(10**5, 25.0)) == 8


def test_a_folder_of_frames(tmp_path: Path) -> None:
    """Prevents frames of a folder from being taken in another order than that of their names."""
    for index in reversed(range(5)):
        gray(25 * index).save(tmp_path / f"{index:03d}.png")
    (tmp_path / "notes.txt").write_text("no frame")
    assert [level(frame) for frame in load_video_frames(tmp_path, Sampling(3))] == [0, 2, 4]
    assert probe(tmp_path, "video").frames == 5
    (tmp_path / "empty").mkdir()
    assert problem(lambda: load_video_frames(tmp_path / "empty", Sampling(3))) == "undecodable"
    assert problem(lambda: load_video_frames(tmp_path, Sampling(3), Limits(max_frames=4))) == "too_long"


def test_turned_videos_are_shown_upright(tmp_path: Path) -> None:
    """Prevents telephone videos from being trained on sideways."""
    image = gray(0, (64, 32))
    image.paste(WHITE, (0, 0, 32, 32))
    path = tmp_path / "a.mp4"
    encode(path, [image] * 2)
    content = bytearray(path.read_bytes())
    matrix = content.index(b"tkhd") + 44
    one = 0x10000
    content[matrix : matrix + 36] = struct.pack(">9i", 0, one, 0, -one, 0, 0, 32 * one, 0, 0x40000000)
    path.write_bytes(content)
    frame = load_video_frames(path, Sampling(1))[0]
    assert frame.size == (32, 64)
    assert frame.getpixel((16, 3))[0] > 200 and frame.getpixel((16, 60))[0] < 50


@pytest.mark.parametrize("container", [{}, {"movflags": "faststart"}])
def test_truncated_videos_are_refused_by_probing(tmp_path: Path, container: dict[str, str]) -> None:
    """Prevents cut-off uploads from passing, with the index lost and with the index kept."""
    content = clip(tmp_path / "a.mp4", **container).read_bytes()
    (tmp_path / "b.mp4").write_bytes(content[: int(len(content) * 0.8)])
    assert problem(lambda: probe(tmp_path / "b.mp4", "video")) == "undecodable"


def test_a_video_without_frames(tmp_path: Path) -> None:
    """Prevents an empty list of frames from reaching the model."""
    import av

    with av.open(str(tmp_path / "sound.mp4"), "w") as file:
        stream = file.add_stream("aac", rate=8000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.rate = 8000
        file.mux(stream.encode(frame))
        file.mux(stream.encode())
    (tmp_path / "text.mp4").write_text("hello")
    for name in ("sound.mp4", "text.mp4"):
        assert problem(lambda name=name: load_video_frames(tmp_path / name, Sampling(8))) == "undecodable"
    content = bytearray(clip(tmp_path / "a.mp4").read_bytes())
    start = content.index(b"mdat") + 4
    size = struct.unpack(">I", content[start - 8 : start - 4])[0] - 8
    content[start : start + size] = bytes(size)
    (tmp_path / "zero.mp4").write_bytes(content)
    assert problem(lambda: load_video_frames(tmp_path / "zero.mp4", Sampling(8))) == "undecodable"


def test_long_videos_are_refused(tmp_path: Path) -> None:
    """Prevents a video of hours from occupying a worker."""
    path = clip(tmp_path / "a.mp4")  # 8 frames, 2 seconds
    assert problem(lambda: probe(path, "video", Limits(max_frames=7))) == "too_long"
    assert problem(lambda: load_video_frames(path, Sampling(2), Limits(max_seconds=1))) == "too_long"
    assert problem(lambda: load_video_frames(path, Sampling(2), Limits(max_pixels=1000))) == "too_large"


def test_playlists_are_not_followed(tmp_path: Path) -> None:
    """Prevents a text file named .mp4 from making FFmpeg open other files or addresses."""
    clip(tmp_path / "secret.mp4")
    playlist = "#EXTM3U\n#EXT-X-TARGETDURATION:2\n#EXTINF:2,\nsecret.mp4\n#EXT-X-ENDLIST\n"
    (tmp_path / "a.mp4").write_text(playlist)
    (tmp_path / "b.mp4").write_text("ffconcat version 1.0\nfile secret.mp4\n")
    for name in ("a.mp4", "b.mp4"):
        assert problem(lambda name=name: load_video_frames(tmp_path / name, Sampling(8))) == "undecodable"
