"""The endpoint's media: addresses become pictures and frames, within what one request may take, and are kept a while.

`sources` and `remote` bring the bytes, `components/data` decodes them, `connector` hands the result to vLLM.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from nvila.components.contracts.errors import DataError
from nvila.components.contracts.foreign import read_object, reading
from nvila.components.contracts.recipe.endpoint import EndpointSettings
from nvila.components.data.limits import Limits, MediaError, metered
from nvila.components.data.media import load_image, load_video_frames
from nvila.components.data.picture import Shrink, whole
from nvila.components.data.sampling import Sampling
from nvila.components.serve.remote import Remote
from nvila.components.serve.sources import DataUrl, from_base64, from_file
from nvila.components.serve.told import Told

if TYPE_CHECKING:
    from nvila.components.model.config.config import ModelConfig

THREADS = 256
"""Most of them wait for their turn."""
QUICK, LONG, WAITING = max(4, os.cpu_count() or 1), max(2, (os.cpu_count() or 1) // 2), THREADS * 3 // 4
"""How many decode at a time: in the beginning, and those that take long; and how many of the latter may wait."""
QUICK_SECONDS = 0.3
QUICK_PIXELS = 16_000_000
"""Of a picture; what has more takes long, and much memory."""
PIXELS_PER_SECOND = 10**9
"""Nothing decodes faster on one core; what a request may decode, on whatever machine."""


class BusyError(MediaError):
    """So much is decoded for others that this medium never had its turn."""

    def __init__(self) -> None:
        super().__init__("too_long", "this server decodes other media now; ask again later", "media")


class Allowance:
    """What is left to one request for its media; threads take from it."""

    def __init__(self, settings: EndpointSettings, sampling: Sampling | None = None) -> None:
        self.bytes = settings.max_body_mib * 2**20 * 3 // 4
        self.seconds = settings.max_media_seconds
        self.pixels = self.seconds * PIXELS_PER_SECOND
        self.sampling = sampling
        """What the request asks for instead of the model's own."""
        self.clips: list[float | None] = []
        """Seconds of each clip so far; None of one without times."""
        self._lock = threading.Lock()

    def take_bytes(self, count: int) -> None:
        """Raises:
        ValueError: there are not so many left.
        """
        with self._lock:
            self.bytes -= count
        if self.bytes < 0:
            raise ValueError("the media of a request have too many bytes together")

    def take(self, seconds: float, pixels: int) -> None:
        """Raises:
        MediaError: nothing is left.
        """
        with self._lock:
            self.seconds -= seconds
            self.pixels -= pixels
        if self.seconds < 0 or self.pixels < 0:
            what = "decoding the media of this request takes too long; send fewer, shorter or smaller ones"
            raise MediaError("too_long", what, "media")


class Turns:
    """Which threads decode: one that takes long leaves its place to others and goes on in one of few.

    So whoever sends what takes long waits for his like, and nobody else for him.
    """

    def __init__(self, seconds: float, quick: int = QUICK, long: int = LONG, waiting: int = WAITING) -> None:
        self._seconds = seconds
        """Longest wait."""
        self._quick, self._long = threading.Semaphore(quick), threading.Semaphore(long)
        self._queue = threading.Semaphore(long + waiting)

    @contextmanager
    def decoding(self, allowance: Allowance) -> Iterator[None]:
        """Decode in a turn, and take what it costs from the allowance.

        Raises:
            BusyError: waited for as long as one may, or too many wait already.
            MediaError: nothing of the allowance is left.
        """
        held: list[threading.Semaphore] = []
        began = last = 0.0

        def take(place: threading.Semaphore, seconds: float) -> None:
            if not place.acquire(timeout=seconds):
                raise BusyError
            held.append(place)

        def meter(pixels: int) -> None:
            nonlocal last
            allowance.take((now := time.monotonic()) - last, pixels)
            if self._quick in held and (now - began > QUICK_SECONDS or pixels > QUICK_PIXELS):
                held.pop().release()
                take(self._queue, 0)
                take(self._long, self._seconds)
                now = time.monotonic()
            last = now

        try:
            take(self._quick, self._seconds)
            began = last = time.monotonic()
            with metered(meter):
                yield
                meter(0)
        finally:
            for place in held:
                place.release()


class Clip(np.ndarray):
    """Frames (F, H, W, 3) uint8."""

    seconds: float | None = None
    """How long the whole clip is shown, where it is known."""


class Cache:
    """Arrays by key, the least recently used ones dropped; for threads."""

    def __init__(self, max_bytes: int) -> None:
        self._kept: OrderedDict[bytes, np.ndarray] = OrderedDict()
        self._most = self._room = max_bytes
        self._lock = threading.Lock()

    def get(self, key: bytes) -> np.ndarray | None:
        """The array of that key, if it is still there."""
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
            return self._kept.get(key)

    def put(self, key: bytes, array: np.ndarray) -> None:
        """Keep it, where it fits; nobody may write to it any more."""
        array.flags.writeable = False
        with self._lock:
            if key not in self._kept and array.nbytes <= self._most:
                self._kept[key] = array
                self._room -= array.nbytes
            while self._room < 0:
                self._room += self._kept.popitem(last=False)[1].nbytes


@dataclass(frozen=True)
class Content:
    """The bytes of a medium, and what is to be made of them."""

    kind: Literal["image", "video"]
    parts: tuple[bytes, ...]
    """One file, or the frames of a clip."""
    is_frames: bool = False
    sampling: Sampling | None = None

    @cached_property
    def key(self) -> bytes:
        """Digest of all of it: equal for no two contents that are decoded to different pixels."""
        sampled = self.sampling and self.sampling.to_options()
        digest = hashlib.sha256(json.dumps([self.kind, self.is_frames, sampled, [*map(len, self.parts)]]).encode())
        for part in self.parts:
            digest.update(part)
        return digest.digest()


@dataclass(frozen=True)
class Medium:
    """Decoded, and which content that was."""

    pixels: np.ndarray
    """(H, W, 3) of a picture, (F, H, W, 3) of a clip; uint8, and not to be written to."""
    key: bytes


@dataclass
class Media:
    """What one server process knows about media."""

    settings: EndpointSettings
    config: ModelConfig | None = None
    """Frames are kept in the size that this model sees; as they are without."""
    remote: Remote = field(init=False)

    def __post_init__(self) -> None:
        most = self.allowance().bytes
        self.limits = Limits(max_bytes=most, max_seconds=600.0, max_frames=36_000)
        self.remote = Remote(frozenset(self.settings.media_domains), most)
        self.folders = [Path(folder) for folder in self.settings.media_folders]
        self.cache = Cache(self.settings.media_cache_mib * 2**20)
        self.turns = Turns(self.settings.request_seconds / 2)
        self._pool = ThreadPoolExecutor(THREADS, "media")
        self._decoding: dict[bytes, Future[np.ndarray]] = {}
        self._lock = threading.Lock()

    @classmethod
    def of_process(cls) -> Media:
        """As the process was told (`Told`)."""
        from nvila.components.model.config.config import ModelConfig

        told = Told.read()
        if told.model_dir is None:
            return cls(told.settings)
        with reading(place := told.model_dir / "config.json"):
            return cls(told.settings, ModelConfig.from_json(read_object(place)["nvila"]))

    def allowance(self) -> Allowance:
        """Of a new request."""
        return Allowance(self.settings)

    async def picture(self, url: str, allowance: Allowance) -> Medium:
        """The picture behind an address, upright, in RGB.

        Raises:
            ValueError: it cannot be had or decoded, or takes more than is left.
            BusyError: others kept it from being decoded.
        """
        return await self._medium(url, "image", None, allowance)

    async def clip(self, url: str, sampling: Sampling, allowance: Allowance) -> Medium:
        """The frames of the clip behind an address that the sampling names. Frames that a client sends are taken as
        they are where the model takes so many; else they are what is sampled from.

        Raises:
            ValueError, BusyError: as of `picture`.
        """
        found = await self._medium(url, "video", allowance.sampling or sampling, allowance)
        allowance.clips.append(getattr(found.pixels, "seconds", None))
        return found

    async def _medium(
        self, url: str, kind: Literal["image", "video"], sampling: Sampling | None, allowance: Allowance
    ) -> Medium:
        loop = asyncio.get_running_loop()
        if url[:7].lower() in ("http://", "https:/"):
            content = Content(kind, (await self.remote.fetch(url, allowance.take_bytes),), sampling=sampling)
            await loop.run_in_executor(self._pool, lambda: content.key)
        else:
            content = await loop.run_in_executor(self._pool, self._content, url, kind, sampling, allowance)
        try:
            return Medium(await self._pixels(content, allowance), content.key)
        except BusyError:
            raise
        except DataError as error:
            raise ValueError(error.what) from error

    def _content(
        self, url: str, kind: Literal["image", "video"], sampling: Sampling | None, allowance: Allowance
    ) -> Content:
        most = self.limits.max_bytes
        if url[:5].lower() == "data:":
            given = DataUrl.parse(url)
            parts = given.parts
            if given.is_frames and sampling is not None:
                if len(parts) > self.limits.max_frames:
                    raise ValueError(f"a clip may have at most {self.limits.max_frames} frames")
                if not sampling.allows(len(parts)):
                    parts = [parts[place] for place in sampling.places(len(parts))]
            elif len(parts) > 1:
                raise ValueError("a picture has one part; frames of a clip belong into a video_url")
            read = tuple(from_base64(part, most) for part in parts)
            allowance.take_bytes(sum(map(len, read)))
            content = Content(kind, read, given.is_frames and kind == "video", sampling)
        elif url[:5].lower() == "file:":
            content = Content(kind, (from_file(url, self.folders, allowance.take_bytes),), sampling=sampling)
        else:
            raise ValueError("a media URL must be a data: URL, or of a kind that this server allows")
        content.key  # noqa: B018 - here, and not in the event loop
        return content

    async def _pixels(self, content: Content, allowance: Allowance) -> np.ndarray:
        """Decoded once, however many ask for it at a time. Who waited in vain for another's tries by himself."""
        with self._lock:
            kept = self.cache.get(content.key)
            if kept is not None:
                return kept
            running = self._decoding.get(content.key)
            if running is None:
                own = self._decoding[content.key] = self._pool.submit(self._decode, content, allowance)
        if running is None:
            own.add_done_callback(partial(self._forget, content.key))
            return await asyncio.shield(asyncio.wrap_future(own))
        try:
            return await asyncio.shield(asyncio.wrap_future(running))
        except DataError:
            return await asyncio.wrap_future(self._pool.submit(self._decode, content, allowance))

    def _forget(self, key: bytes, _: object) -> None:
        with self._lock:
            self._decoding.pop(key, None)

    def _decode(self, content: Content, allowance: Allowance) -> np.ndarray:
        shrink: Shrink = whole
        if self.config:
            from nvila.components.model.vision.preprocess import shrunk

            shrink = partial(shrunk, config=self.config)
        with self.turns.decoding(allowance):
            if content.kind == "image":
                made = np.asarray(_by_path(content.parts[0], partial(load_image, limits=self.limits)))
            else:
                if content.is_frames:
                    load = partial(load_image, limits=self.limits)
                    each = {part: shrink(_by_path(part, load)) for part in {*content.parts}}
                    frames = [each[part] for part in content.parts]
                else:
                    assert content.sampling is not None
                    spread = partial(load_video_frames, sampling=content.sampling, limits=self.limits, shrink=shrink)
                    frames = _by_path(content.parts[0], spread)
                if len({frame.size for frame in frames}) > 1:
                    raise MediaError("undecodable", "the frames of a clip have different sizes", "media")
                made = clip = np.stack([np.asarray(frame) for frame in frames]).view(Clip)
                clip.seconds = getattr(frames, "seconds", None)
        self.cache.put(content.key, made)
        return made


def asked_sampling(options: Any, own: Sampling | None) -> Sampling | None:
    """What the `media_io_kwargs` of a request mean for clips; None is the model's own sampling.

    A model without a rate takes exactly its own number of frames. One with a rate takes up to its number, at up to its
    rate.

    Raises:
        ValueError: they say what cannot take effect, or what the model was not made for.
    """
    if not options:
        return None
    video = options.get("video") if isinstance(options, Mapping) and {*options} == {"video"} else None
    if not isinstance(video, Mapping) or not video or not {*video} <= {"num_frames", "fps"} or own is None:
        raise ValueError("media_io_kwargs may say video.num_frames and video.fps; nothing else has an effect here")
    frames, fps = video.get("num_frames", own.frames), video.get("fps", own.fps)
    if not all(isinstance(value, int | float) and not isinstance(value, bool) for value in (frames, fps)):
        raise ValueError("media_io_kwargs.video.num_frames and .fps must be numbers")
    if own.fps and 0 < frames <= own.frames and frames == int(frames) and 0 < fps <= own.fps:
        return Sampling(int(frames), float(fps))
    if (frames, fps) != (own.frames, own.fps):
        takes = f"up to {own.frames} frames at up to {own.fps:g} a second" if own.fps else f"{own.frames} frames"
        raise ValueError(f"this model takes {takes} of a clip; media_io_kwargs.video cannot ask for others")
    return None


def _by_path(content: bytes, load: Callable[[Path], Any]) -> Any:
    """Run one of our path-based decoders on bytes: a file without a name, of which a killed process leaves nothing."""
    file = os.memfd_create("media", os.MFD_CLOEXEC)
    try:
        view = memoryview(content)
        while view:
            view = view[os.write(file, view) :]
        return load(Path(f"/proc/self/fd/{file}"))
    finally:
        os.close(file)


_ALLOWANCE: ContextVar[Allowance | None] = ContextVar("allowance", default=None)


def begin(allowance: Allowance) -> None:
    """All media that this context and its tasks read from now on are one request's."""
    _ALLOWANCE.set(allowance)


def begun() -> Allowance | None:
    """What is left to the request of this context."""
    return _ALLOWANCE.get()
