"""Video files that may be broken or hostile: opens them within the limits, and finds the frames that a player shows."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from nvila.components.data.limits import Limits, MediaError, check_length, check_pixels, decoded, decoding
from nvila.components.data.picture import Shape, Shrink, square_pixels, to_picture, whole
from nvila.components.data.sampling import Timeline
from nvila.components.data.seek import decode_at
from nvila.components.data.survey import Survey, survey

if TYPE_CHECKING:
    import av.container
    import av.video.frame
    import av.video.stream
    from PIL import Image

VIDEO_FORMATS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpeg,mpegts,gif,apng"
"""FFmpeg's other demuxers are not tried: playlists among them open further files and addresses."""
Choose = Callable[[Timeline], Sequence[int]]
"""From when the frames are shown to places among them."""


def chosen_frames(path: Path, choose: Choose, limits: Limits, shrink: Shrink = whole) -> list[Image.Image]:
    """The frames that `choose` names, RGB, as a player shows them, each kept as `shrink` makes it.

    Only the groups of pictures that hold them are decoded. Where the file or one of these groups is damaged, they are
    chosen among the frames before the first damage of the file.

    Raises:
        MediaError: larger than the limits, or without a single frame.
    """
    timeline, pictures = None, None
    try:
        with _opened(path, limits, shrink) as clip:
            found = clip.survey()
            timeline, chosen = found.timeline, choose(found.timeline)
            pictures = clip.sought(found, chosen, seeking=True)
        if pictures is None and not found.counted:
            with _opened(path, limits, shrink) as clip:
                pictures = clip.sought(found, chosen, seeking=False)
    except MediaError as error:
        if error.problem != "undecodable":
            raise
    return _in_sequence(path, choose, limits, timeline, shrink) if pictures is None else pictures


def _in_sequence(
    path: Path, choose: Choose, limits: Limits, timeline: Timeline | None, shrink: Shrink = whole
) -> list[Image.Image]:
    """The chosen frames, all before them decoded: of `timeline`, or of what decodes where that is less."""
    for attempt in (timeline, None):
        if attempt is None:
            with _opened(path, limits) as clip:
                attempt = clip.decodable()
        chosen = choose(attempt)
        with _opened(path, limits, shrink) as clip:
            kept = clip.kept({*chosen})
        if len(kept) == len({*chosen}):
            return [kept[place] for place in chosen]
    raise MediaError("undecodable", "the video decodes to another number of frames each time", path)


def probe_video(path: Path, limits: Limits) -> tuple[tuple[int, int], int, float]:
    """Size, number of frames and seconds, after every frame was decoded and held against what the packets promise.

    Raises:
        MediaError: larger than the limits, damaged, or another number of frames, or at other times, than is promised.
    """
    with _opened(path, limits) as clip:
        found = clip.survey()
    ticks: list[int | None] = []
    with _opened(path, limits) as clip:
        for frame in clip.frames(strict=True):
            ticks.append(frame.pts)
            size = clip.size(frame)
    there, promised = len(ticks), len(found.ticks)
    if there < promised:
        raise MediaError("undecodable", f"truncated video: {there} of {promised} frames can be decoded", path)
    if there > promised:
        raise MediaError("undecodable", f"{there} frames can be decoded where the file says {promised}", path)
    if not found.counted and ticks != found.ticks:
        place = next(n for n, (seen, said) in enumerate(zip(ticks, found.ticks, strict=True)) if seen != said)
        raise MediaError("undecodable", f"frame {place} is shown at another time than the file says", path)
    return size, there, round(found.timeline.seconds, 3)


def video_size(path: Path, limits: Limits) -> tuple[int, int]:
    """Width and height of the first frame, as shown.

    Raises:
        MediaError: larger than the limits, or no frame can be decoded.
    """
    with _opened(path, limits) as clip:
        for frame in clip.frames():
            return clip.size(frame)
    raise MediaError("undecodable", "the video has no frame that can be decoded", path)


@dataclass
class _Clip:
    """An open file, of which one method is called once."""

    container: av.container.InputContainer
    stream: av.video.stream.VideoStream
    path: Path
    limits: Limits
    shrink: Shrink
    shape: Shape | None = None
    """As the first frame says."""

    def survey(self) -> Survey:
        """What the packets are; frames that cannot be decoded at the beginning are left out."""
        found = survey(self.container, self.stream, self.path, self.limits)
        if not found.is_open:
            return found
        with _opened(self.path, self.limits) as clip:
            for frame in clip.frames():
                if frame.pts is not None:
                    return found.beginning_at(frame.pts)
        raise MediaError("undecodable", "the video has no frame that can be decoded", self.path)

    def sought(self, found: Survey, chosen: Sequence[int], *, seeking: bool) -> list[Image.Image] | None:
        """The chosen frames; None where only decoding from the beginning finds them."""
        if found.counted:
            return None
        pictures = decode_at(self.container, self.stream, found, {*chosen}, self.picture, seeking=seeking)
        return None if pictures is None else [pictures[place] for place in chosen]

    def frames(self, *, strict: bool = False) -> Iterator[av.video.frame.VideoFrame]:
        """All frames in the order of showing. With `strict` a damaged place is an error, else the end."""
        import av

        number, began = 0, None
        try:
            for packet in self.container.demux(self.stream):
                decoded(0)
                for frame in packet.decode():
                    number += 1
                    decoded(frame.width * frame.height)
                    if frame.time is not None:
                        began = frame.time if began is None else began
                    check_length(number, 0.0 if began is None else frame.time - began, self.path, self.limits)
                    self.size(frame)
                    yield frame
        except av.error.FFmpegError:
            if strict:
                raise

    def decodable(self) -> Timeline:
        """When the frames before the first damage are shown."""
        times = [frame.time for frame in self.frames()]
        if not times:
            raise MediaError("undecodable", "the video has no frame that can be decoded", self.path)
        known = sorted(time for time in times if time is not None)
        rate = float(self.stream.average_rate or self.stream.guessed_rate or 1)
        seconds = (
            [time - known[0] for time in known] if len(known) == len(times) else [n / rate for n in range(len(times))]
        )
        return Timeline(seconds, seconds[-1] + 1 / rate, (rate,))

    def kept(self, places: Collection[int]) -> dict[int, Image.Image]:
        """The frames at some places, by counting; those before the first damage."""
        kept: dict[int, Image.Image] = {}
        for place, frame in enumerate(self.frames()):
            if place in places:
                kept[place] = self.picture(frame)
            if len(kept) == len(places):
                break
        return kept

    def size(self, frame: av.video.frame.VideoFrame) -> tuple[int, int]:
        """As shown, and within the limits."""
        size = self._shape(frame).size(frame)
        check_pixels(*size, self.path, self.limits)
        return size

    def picture(self, frame: av.video.frame.VideoFrame) -> Image.Image:
        """As shown, within the limits, and as it is to be kept."""
        self.size(frame)
        return self.shrink(to_picture(frame, self._shape(frame)))

    def _shape(self, frame: av.video.frame.VideoFrame) -> Shape:
        self.shape = self.shape or Shape.of(frame, self.stream.sample_aspect_ratio)
        return self.shape


@contextmanager
def _opened(path: Path, limits: Limits, shrink: Shrink = whole) -> Iterator[_Clip]:
    import av

    options = {"format_whitelist": VIDEO_FORMATS, "protocol_whitelist": "file"}
    with decoding(path), av.open(f"file:{path.absolute()}", options=options) as container:
        stream = _shown_stream(container)
        if stream is None:
            raise MediaError("undecodable", "the file holds no video", path)
        size = square_pixels(stream.width, stream.height, stream.sample_aspect_ratio)
        check_pixels(*size, path, limits)
        decoded(stream.width * stream.height)  # to look for its format, a frame was
        stream.thread_type = "NONE"
        yield _Clip(container, stream, path, limits, shrink)


def _shown_stream(container: av.container.InputContainer) -> av.video.stream.VideoStream | None:
    """The default video, or the first; no cover picture and none for which there is no decoder."""
    from av.stream import Disposition

    stills = Disposition.attached_pic | Disposition.timed_thumbnails | Disposition.still_image
    videos = [s for s in container.streams.video if s.codec_context is not None and not s.disposition & stills]
    return max(videos, key=lambda stream: bool(stream.disposition & Disposition.default), default=None)
