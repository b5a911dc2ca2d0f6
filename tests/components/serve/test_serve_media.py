"""What clients send as pictures and clips, and what they may make the server do with it."""

from __future__ import annotations

import asyncio
import base64
import io
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal
from urllib.parse import quote

import numpy as np
import pytest
from PIL import Image
from servable import clip, picture, servable_model

from nvila.components.contracts.recipe.endpoint import EndpointSettings
from nvila.components.data.limits import decoded
from nvila.components.data.media import load_image, load_video_frames
from nvila.components.data.sampling import Sampling
from nvila.components.model.vision.preprocess import preprocess_video
from nvila.components.serve import media as endpoint
from nvila.components.serve.media import BusyError, Cache, Media, Medium, Turns, asked_sampling
from nvila.components.serve.sources import from_file

FOUR = Sampling(4)


@pytest.fixture
def media() -> Media:
    return Media(EndpointSettings())


def _encoded(content: bytes, kind: str = "image/png") -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def _frames(pictures: list[Image.Image], kind: str = "video/jpeg", form: str = "PNG") -> str:
    files = []
    for one in pictures:
        file = io.BytesIO()
        one.save(file, form)
        files.append(base64.b64encode(file.getvalue()).decode())
    return f"data:{kind};base64,{','.join(files)}"


def _picture(media: Media, url: str) -> Medium:
    return asyncio.run(media.picture(url, media.allowance()))


def _clip(media: Media, url: str, sampling: Sampling = FOUR) -> Medium:
    return asyncio.run(media.clip(url, sampling, media.allowance()))


def _refused(call: Callable[[], Any]) -> str:
    with pytest.raises(ValueError) as error:
        call()
    return str(error.value)


def _noise(width: int, height: int, form: str = "PNG") -> bytes:
    file = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file, form)
    return file.getvalue()


def test_spellings_of_a_data_url(media: Media, tmp_path: Path) -> None:
    """Clients that break lines, use the URL-safe alphabet, leave out the padding or the type, or encode per cent were
    refused; or, worse, would get the answer to other bytes."""
    content = picture(tmp_path / "a.png", 1, (7, 5)).read_bytes()
    content += b"\xff" * (4 - len(content) % 3)  # so that alphabets and padding differ
    plain = base64.b64encode(content).decode()
    assert "/" in plain and plain.endswith("==")
    lines = base64.encodebytes(content).decode()
    expected = np.asarray(load_image(tmp_path / "a.png"))
    for url in (
        f"data:image/png;base64,{plain}",
        f"data:image/png;base64,{lines}",
        f"data:image/png;base64,{lines.replace(chr(10), chr(13) + chr(10))}",
        f"data:image/png;base64, {plain[:9]} {plain[9:]}\t",
        f"data:image/png;base64,{base64.urlsafe_b64encode(content).decode()}",
        f"data:image/png;base64,{plain.rstrip('=')}",
        f"data:image/png;base64,{base64.urlsafe_b64encode(content).decode().rstrip('=')}",
        f"data:image/png;base64,{quote(plain, safe='')}",
        f"data:image/png;base64,{quote(lines)}",
        f"data:image/png;charset=utf-8;name=a;base64,{plain}",
        f"DATA:IMAGE/PNG;BASE64,{plain}",
        f"data:image%2Fpng;base64,{plain}",
        f"data:;base64,{plain}",
        f"data:application/octet-stream; base64,{plain}",
        f"data:image/jpeg;base64,{plain}\n",
    ):
        assert np.array_equal(_picture(media, url).pixels, expected), url[:60]


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("data:image/png,%89PNG", "must be in base64"),
        ("data:text/plain;charset=utf-8,hello", "must be in base64"),
        ("data:image/svg+xml;utf8,<svg/>", "must be in base64"),
        ("data:image/png;base64", "must be in base64"),
        ("data:base64,AAAA", "must be in base64"),
        ("data:image/png;base64,", "missing or not base64"),
        ("data:image/png;base64,====", "missing or not base64"),
        ("data:image/png;base64,A", "not base64"),
        ("data:image/png;base64,AAAA=AAA", "not base64"),
        ("data:image/png;base64,AAAA====", "missing or not base64"),
        ("data:image/png;base64,####", "not base64"),
        ("data:image/png;base64,%23%23%23%23", "not base64"),
        ("data:image/png;base64,\u00e4AAA", "not base64"),
        ("data:image/png;base64,AAAA,AAAA", "one part"),
        ("data:image/png;base64," + base64.b64encode(b"no picture").decode(), "cannot be decoded"),
        ("file:///etc/hostname", "switched off"),
        ("http://127.0.0.1:1/x.png", "switched off"),
        ("ftp://example.com/x.png", "must be a data: URL"),
        ("/etc/hostname", "must be a data: URL"),
        ("x", "must be a data: URL"),
    ],
)
def test_other_urls_are_refused_with_a_reason(media: Media, url: str, reason: str) -> None:
    """A fault of ours (500), or silence, where the client could mend its request."""
    assert reason in _refused(lambda: _picture(media, url))


@pytest.mark.parametrize("form", ["GIF", "PNG", "WEBP"])
def test_animations_are_clips(media: Media, tmp_path: Path, form: str) -> None:
    """An animation that a client calls a clip must have the frames that training takes, whatever its type says."""
    path = tmp_path / f"a.{form.lower()}"
    images = [Image.new("RGB", (32, 24), (40 * n, 0, 255 - 40 * n)) for n in range(6)]
    images[0].save(path, form, save_all=True, append_images=images[1:], duration=100, lossless=True)
    expected = np.stack([np.asarray(frame) for frame in load_video_frames(path, FOUR)])
    assert len({frame.tobytes() for frame in expected}) == 4
    for kind in (f"image/{form.lower()}", "video/mp4", ""):
        assert np.array_equal(_clip(media, _encoded(path.read_bytes(), kind)).pixels, expected)


@pytest.mark.parametrize("mode", ["resize", "pad", "dynamic_s2", "s2"])
def test_frames_as_a_clip_are_the_clip(tmp_path: Path, mode: str) -> None:
    """The harm: 120 clips gave 117 right answers as files and 36 as frames, silently. Frames that our sampler takes,
    sent losslessly, must become the model's input of the clip itself, to the bit."""
    scales = (28, 56) if mode.endswith("s2") else (28,)
    model, _ = servable_model(vision_mode=mode, s2_scales=scales)
    path = clip(tmp_path / "a.mp4", 1)
    frames = load_video_frames(path, FOUR)
    expected = preprocess_video(frames, model.config, pixels=True).tiles
    assert len(expected.unique(dim=0)) > 1
    for config in (model.config, None):
        media = Media(EndpointSettings(), config)
        for url in (
            _encoded(path.read_bytes(), "video/mp4"),
            _frames(frames),
            _frames(frames, kind="VIDEO/JPEG;x=y"),
            _frames(frames, kind="image/png"),
            _frames(frames).replace("base64,", "base64,\n").replace("=", ""),
        ):
            seen = [Image.fromarray(frame) for frame in _clip(media, url).pixels]
            assert preprocess_video(seen, model.config, pixels=True).tiles.equal(expected)


def test_other_numbers_of_frames_are_sampled_as_a_folder_is(media: Media, tmp_path: Path) -> None:
    """Frames beyond the model's number were cut off at the end by vLLM; too few ended in an error."""
    images = [Image.new("RGB", (16, 16), (20 * n, 0, 0)) for n in range(11)]
    for count in (1, 2, 3, 4, 5, 11):
        folder = tmp_path / str(count)
        folder.mkdir()
        for n, image in enumerate(images[:count]):
            image.save(folder / f"{n}.png")
        expected = np.stack([np.asarray(frame) for frame in load_video_frames(folder, FOUR)])
        assert np.array_equal(_clip(media, _frames(images[:count])).pixels, expected)
    rate = Sampling(4, 2.0)
    assert [len(_clip(media, _frames(images[:count]), rate).pixels) for count in (1, 3, 4, 9)] == [1, 3, 4, 4]


def test_bad_frames_are_refused(media: Media) -> None:
    """A frame that cannot be decoded, is missing, or has another size must not become another clip."""
    good = Image.new("RGB", (8, 8))
    url = _frames([good] * 4)
    head, first, *_ = url.replace("base64,", "base64,,", 1).split(",")[:1] + url.partition(",")[2].split(",")
    head = "data:video/jpeg;base64"
    assert "cannot be decoded" in _refused(lambda: _clip(media, f"{head},{first},{first},{first},AAAA"))
    assert "missing" in _refused(lambda: _clip(media, f"{head},{first},{first},,{first}"))
    assert "different sizes" in _refused(lambda: _clip(media, _frames([good] * 3 + [Image.new("RGB", (8, 9))])))
    many = ",".join([first] * 40_000)
    assert "at most 36000 frames" in _refused(lambda: _clip(media, f"{head},{many}"))


def test_files_of_named_folders_alone(tmp_path: Path) -> None:
    """`file://` is a way to every file of the server: `..`, links, devices and other hosts lead nowhere, and a refusal
    tells nothing about what is there."""
    inner, outer = tmp_path / "a b", tmp_path / "a bc"
    inner.mkdir()
    outer.mkdir()
    picture(inner / "100%.png", 1)
    picture(outer / "x.png", 2)
    (inner / "link.png").symlink_to(outer / "x.png")
    (inner / "within.png").symlink_to(inner / "100%.png")
    (inner / "folder").symlink_to(outer)
    os.mkfifo(inner / "pipe")
    (inner / "device").symlink_to("/dev/zero")
    media = Media(EndpointSettings(media_folders=[str(inner)]))
    expected = np.asarray(load_image(inner / "100%.png"))
    at = quote(str(inner))
    for good in (f"file://{at}/100%25.png", f"FILE://localhost{at}/100%25.png", f"file://{at}/within.png"):
        assert np.array_equal(_picture(media, good).pixels, expected)
    told = {
        _refused(lambda url=url: _picture(media, url))  # type: ignore[misc]
        for url in (
            f"file://{quote(str(outer))}/x.png",
            f"file://{at}/../a%20bc/x.png",
            f"file://{at}/%2e%2e/a%20bc/x.png",
            f"file://{at}/link.png",
            f"file://{at}/folder/x.png",
            f"file://{at}/pipe",
            f"file://{at}/device",
            f"file://{at}/missing.png",
            f"file://{at}/x%00.png",
            f"file://{at}",
            "file:///etc/passwd",
            "file:///proc/self/environ",
            "file:///dev/zero",
        )
    }
    assert told == {"no such file in the folders that this server reads media from"}
    for bad in (f"file://evil{at}/100%25.png", f"file:{at}/100%25.png", f"file://{at}/100%25.png?x", "file://x"):
        assert "must read" in _refused(lambda url=bad: _picture(media, url))  # type: ignore[misc]
    with pytest.raises(ZeroDivisionError):  # asked before a byte is read
        from_file(f"file://{at}/100%25.png", [inner], lambda count: 1 // (count - (inner / "100%.png").stat().st_size))


def test_what_a_request_may_ask_of_its_clips() -> None:
    """A number of frames that the model does not take ended the engine, or was silently another."""
    assert asked_sampling(None, None) is asked_sampling({}, FOUR) is asked_sampling(None, FOUR) is None
    assert asked_sampling({"video": {"num_frames": 4}}, FOUR) is None
    rated = Sampling(8, 2.0)
    assert asked_sampling({"video": {"num_frames": 3}}, rated) == Sampling(3, 2.0)
    assert asked_sampling({"video": {"fps": 1}}, rated) == Sampling(8, 1.0)
    bad: list[Any] = [{"video": {"num_frames": value}} for value in (3, 5, 0, -1, "4", None, True, float("nan"), 4.5)]
    bad += [{"video": {"num_frames": 4, "fps": 1}}, {"video": {"frames_indices": [0]}}, {"video": {}}, {"video": 4}]
    bad += [{"image": {"image_mode": None}}, {"video": {"num_frames": 4}, "audio": {}}, [1], "x"]
    for options in bad:
        assert _refused(lambda given=options: asked_sampling(given, FOUR))  # type: ignore[misc]
    for video_options in ({"num_frames": 9}, {"num_frames": 2.5}, {"fps": 3}, {"fps": 0}, {"fps": float("inf")}):
        assert _refused(lambda given=video_options: asked_sampling({"video": given}, rated))  # type: ignore[misc]
    assert _refused(lambda: asked_sampling({"video": {"num_frames": 4}}, None))


def test_a_clip_that_takes_too_long_is_ended_between_frames(tmp_path: Path) -> None:
    """A small file that decodes for minutes would hold a thread; it must end soon after its time, by what it costs."""
    path = tmp_path / "a.gif"
    images = [Image.new("L", (500, 400), n % 250) for n in range(300)]
    images[0].save(path, save_all=True, append_images=images[1:], duration=20)
    media = Media(EndpointSettings(max_media_seconds=3600))
    allowance, url = media.allowance(), _encoded(path.read_bytes(), "video/gif")
    allowance.pixels = 500 * 400 * 30
    assert "takes too long" in _refused(lambda: asyncio.run(media.clip(url, FOUR, allowance)))
    assert allowance.pixels == -500 * 400
    assert "takes too long" in _refused(lambda: asyncio.run(media.picture(_encoded(_noise(9, 9)), allowance)))
    assert len(_clip(media, url).pixels) == 4


def test_time_is_checked_between_frames(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same by the clock, which is what counts on a slow machine."""
    ticks = iter(range(10**6))
    monkeypatch.setattr(endpoint.time, "monotonic", lambda: float(next(ticks)))
    media = Media(EndpointSettings(max_media_seconds=30))
    path = tmp_path / "a.gif"
    images = [Image.new("L", (20, 20), n) for n in range(100)]
    images[0].save(path, save_all=True, append_images=images[1:], duration=20)
    assert "takes too long" in _refused(lambda: _clip(media, _encoded(path.read_bytes())))


def test_bytes_of_all_media_of_a_request(tmp_path: Path) -> None:
    """Sixty-four files or remote pictures of the largest size each would fill the memory."""
    content = _noise(500, 500)
    media = Media(EndpointSettings(max_body_mib=1))
    allowance = media.allowance()
    url = _encoded(content)

    def ask() -> Medium:
        return asyncio.run(media.picture(url, allowance))

    assert len(content) * 2 > 2**20 * 3 // 4 > len(content)
    ask()
    assert "too many bytes" in _refused(ask)
    assert "at most" in _refused(lambda: _picture(media, _encoded(content * 2)))


def test_a_server_that_is_busy_is_not_the_askers_error(tmp_path: Path) -> None:
    """A client that is told that its picture is bad will not ask again: 503 and not 400, also from within a decoder."""
    media = Media(EndpointSettings())
    media.turns = Turns(0.01, quick=1, long=0)
    path = tmp_path / "a.gif"
    images = [Image.new("L", (2000, 2000), n) for n in range(50)]
    images[0].save(path, save_all=True, append_images=images[1:], duration=20)
    with pytest.raises(BusyError), pytest.MonkeyPatch.context() as patch:
        patch.setattr(endpoint, "QUICK_SECONDS", 0)
        _clip(media, _encoded(path.read_bytes()))
    with media.turns.decoding(media.allowance()), pytest.raises(BusyError):
        _picture(media, _encoded(_noise(9, 9)))


def test_whoever_takes_long_keeps_nobody_else_waiting() -> None:
    """As many bombs as threads would stop the media of everybody: they wait for each other only, and not without
    limit."""
    turns = Turns(60, quick=1, long=1, waiting=1)
    media = Media(EndpointSettings(max_media_seconds=60))
    go, long, ends = threading.Event(), threading.Semaphore(0), []

    def bomb() -> None:
        try:
            with turns.decoding(media.allowance()):
                long.release()
                decoded(endpoint.QUICK_PIXELS + 1)  # leaves its place
                assert go.wait(60)
                ends.append("done")
        except BusyError:
            ends.append("busy")

    with ThreadPoolExecutor(3) as pool:
        bombs = [pool.submit(bomb) for _ in range(3)]
        for _ in bombs:
            assert long.acquire(timeout=60)
        for _ in range(3):
            with turns.decoding(media.allowance()):  # one place, and never held
                decoded(100)
        go.set()
        for each in bombs:
            each.result(60)
    assert sorted(ends) == ["busy", "done", "done"]
    with turns.decoding(media.allowance()):
        decoded(endpoint.QUICK_PIXELS + 1)


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    calls: list[Any] = []
    load = endpoint.load_image

    def counting(*args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        return load(*args, **kwargs)

    monkeypatch.setattr(endpoint, "load_image", counting)
    return calls


def test_same_picture_is_decoded_once(media: Media, counted: list[Any]) -> None:
    """A 12-megapixel picture cost 650 ms in each turn of a conversation; asked for at once, each cost them too."""
    content = _noise(300, 200, "JPEG")
    url, other = _encoded(content), _encoded(content, "image/jpeg;x=y").replace("=", "%3D")

    async def together() -> list[Medium]:
        return await asyncio.gather(*(media.picture(url, media.allowance()) for _ in range(16)))

    found = asyncio.run(together())
    assert len(counted) == 1 and len({each.key for each in found}) == 1
    assert _picture(media, other).key == found[0].key and len(counted) == 1
    assert _picture(media, _encoded(_noise(300, 201, "JPEG"))).key != found[0].key and len(counted) == 2


def test_what_is_kept_cannot_be_changed(media: Media) -> None:
    """Whoever draws on a picture would draw on everybody's."""
    pixels = _picture(media, _encoded(_noise(30, 20))).pixels
    with pytest.raises(ValueError, match="read-only"):
        pixels[0] = 0
    image = Image.fromarray(pixels)
    image.paste("red", (0, 0, 30, 20))
    assert np.array_equal(_picture(media, _encoded(_noise(30, 20))).pixels, pixels)
    assert not np.array_equal(np.asarray(image), pixels)


def test_keys_are_of_content_and_settings(media: Media) -> None:
    """Two contents, or two ways to take them, that share an entry: one user reads another's picture. The same bytes are
    a picture and a clip, one file and many frames, cut here and there."""
    files = [base64.b64encode(_noise(9, side)).decode() for side in (3, 4, 5, 6)]
    whole = base64.b64encode(b"".join(base64.b64decode(file) for file in files)).decode()

    def key(body: str, kind: Literal["image", "video"] = "video", sampling: Sampling | None = FOUR) -> bytes:
        return media._content(f"data:{body}", kind, sampling, media.allowance()).key

    keys = [
        key("video/jpeg;base64," + ",".join(files)),
        key("video/jpeg;base64," + ",".join([*files[:2], files[3], files[2]])),
        key("video/jpeg;base64," + files[0]),
        key("video/jpeg;base64," + ",".join(files), sampling=Sampling(2)),
        key("video/jpeg;base64," + whole),
        key("video/mp4;base64," + whole),
        key("video/mp4;base64," + whole, sampling=Sampling(2)),
        key("video/mp4;base64," + whole, sampling=Sampling(2, 1.0)),
        key("video/mp4;base64," + whole, "image", None),
    ]
    assert len({*keys}) == len(keys)
    assert key("image/png;base64," + ",\n".join(file.rstrip("=") for file in files)) == keys[0]
    assert key(";base64," + whole) == key("video/mp4;charset=x;base64," + whole)


def test_cache_keeps_within_its_bytes() -> None:
    """A cache that grows, drops what is used, or throws everything away for one picture that is too large."""
    kept = Cache(100)
    for n in range(5):
        kept.put(bytes([n]), np.zeros(40, np.uint8))
        kept.get(b"\0")
    assert [n for n in range(5) if kept.get(bytes([n])) is not None] == [0, 4]
    kept.put(b"large", np.zeros(101, np.uint8))
    kept.put(b"\4", np.zeros(40, np.uint8))
    assert kept.get(b"large") is None and kept.get(b"\0") is not None and kept.get(b"\4") is not None
    none = Cache(0)
    none.put(b"x", np.zeros(1, np.uint8))
    assert none.get(b"x") is None


def test_anothers_limits_are_not_mine(media: Media, counted: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """A picture that another request is decoding with the last of its allowance must still be answered for me."""
    url = _encoded(_noise(40, 30))
    poor, rich = media.allowance(), media.allowance()
    poor.pixels = 10
    seen = threading.Event()
    load = endpoint.load_image

    def waiting(*args: Any, **kwargs: Any) -> Any:
        assert seen.wait(60)
        return load(*args, **kwargs)

    monkeypatch.setattr(endpoint, "load_image", waiting)

    async def both() -> list[Any]:
        asked = [asyncio.ensure_future(media.picture(url, one)) for one in (poor, rich)]
        await asyncio.sleep(0.2)  # both wait for the same decoding, or else the test shows less
        seen.set()
        return await asyncio.gather(*asked, return_exceptions=True)

    first, second = asyncio.run(both())
    assert isinstance(first, ValueError) and isinstance(second, Medium)
