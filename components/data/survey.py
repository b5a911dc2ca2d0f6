"""Reads the packets of a clip once, without decoding: which frames a player shows, and when.

`validate` holds it against what is decoded, and sampling chooses and seeks by it, so that both mean the same frames.
"""

from __future__ import annotations

import os
from bisect import bisect_right
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

from nvila.components.data.limits import Limits, MediaError, check_length, decoded
from nvila.components.data.sampling import Timeline

if TYPE_CHECKING:
    import av.container
    import av.packet
    import av.video.stream

CUMULATIVE = frozenset({"gif", "apng"})
"""Formats whose frames are drawn over the ones before, although each may be called a key frame."""
BROADCAST = frozenset({"mpegts", "mpeg"})
"""In these a packet that lost a piece does not mean that the end is missing."""


@dataclass(frozen=True)
class Survey:
    """The packets of a clip in the order of decoding, and those of them that become frames in the order of showing.

    Times are in the stream's time base.
    """

    times: list[int | None]
    """Of each packet: when it is shown."""
    sizes: list[int]
    """Of each packet: bytes."""
    seeks: dict[int, int]
    """By position of a key frame, ascending: the time to seek to, when it is decoded."""
    shown: list[int]
    """Positions of the packets that become frames, in the order of showing."""
    ticks: list[int]
    """When these frames are shown, ascending."""
    last: int
    """How long the last one is shown; 0 where nothing says it."""
    counted: bool
    """Times do not tell which packet becomes which frame: frames are counted from the beginning."""
    time_base: Fraction
    rates: tuple[float, ...]
    """Frames per second that the file claims."""

    @cached_property
    def timeline(self) -> Timeline:
        """When the frames are shown, in seconds."""
        first, up, down = self.ticks[0], self.time_base.numerator, self.time_base.denominator
        times = [(tick - first) * up / down for tick in self.ticks]
        mean = times[-1] / max(1, len(times) - 1)
        return Timeline(times, times[-1] + (float(self.last * self.time_base) or mean), self.rates)

    @cached_property
    def keys(self) -> list[int]:
        """Positions of the key frames, ascending."""
        return [*self.seeks]

    @property
    def is_open(self) -> bool:
        """Whether there are packets before the first key frame, of which only a decoder knows if they become frames."""
        key = self.keys[0] if self.keys else None
        began = None if key is None else self.times[key]
        return not self.counted and (key is None or min(self.shown) < key or began is None or self.ticks[0] < began)

    def beginning_at(self, tick: int) -> Survey:
        """Without the frames before the first that a decoder gives."""
        at = bisect_right(self.ticks, tick - 1)
        return replace(self, shown=self.shown[at:], ticks=self.ticks[at:])

    def start(self, position: int) -> int:
        """Where decoding must begin for one packet: at a key frame, or at the beginning.

        A frame may follow a key frame in the file and yet be shown before it (open groups of pictures): it then needs
        the key frame before that one.
        """
        time = self.times[position]
        for key in reversed(self.keys[: bisect_right(self.keys, position)]):
            began = self.times[key]
            if began is not None and time is not None and began <= time:
                return key
        return 0


def survey(
    container: av.container.InputContainer, stream: av.video.stream.VideoStream, path: Path, limits: Limits
) -> Survey:
    """Read all packets of a stream.

    Args:
        container: open and not yet read from; afterwards it is at its end, and knows where its key frames lie.
        stream: the one of its streams that is shown.
        path: where the file lies.
        limits: frames, hidden ones included, and seconds that the clip may have.

    Raises:
        MediaError: the clip is beyond the limits, is cut short or damaged, or shows no frame.
    """
    import av

    formats, codec = {*container.format.name.split(",")}, stream.codec_context.name
    broadcast, cumulative, may_hide = formats & BROADCAST, formats & CUMULATIVE, codec.endswith(("vp8", "vp9"))
    _check_end(path, formats)
    times: list[int | None] = []
    orders: list[int | None] = []
    sizes: list[int] = []
    durations: list[int] = []
    seeks: dict[int, int] = {}
    shown: list[int] = []
    number = 0
    try:
        for number, packet in enumerate(container.demux(stream), 1):
            decoded(0)
            pts, dts, bytes_ = packet.pts, packet.dts, packet.size
            if number > limits.max_frames and (bytes_ or dts is not None):  # PyAV adds an empty one at the end
                check_length(number, 0.0, path, limits)
            if not bytes_:  # AVI has such for frames that stay
                continue
            if packet.is_corrupt and not broadcast:
                raise MediaError("undecodable", "truncated video: a frame is not whole", path)
            if not (packet.is_discard or (may_hide and _is_hidden(packet, codec))):
                shown.append(len(times))
            if packet.is_keyframe and pts is not None and not (times and cumulative):
                seeks[len(times)] = pts if dts is None else dts
            times.append(pts)
            orders.append(dts)
            sizes.append(bytes_)
            durations.append(packet.duration or 0)
    except av.error.FFmpegError as error:
        raise MediaError("undecodable", f"truncated or damaged video: {error.strerror}", path) from error
    if "mov" in formats and len(stream.index_entries) >= number:  # with the empty one
        raise MediaError("undecodable", f"truncated video: {number - 1} of {len(stream.index_entries)} frames", path)
    if not shown:
        raise MediaError("undecodable", "the video has no frame that can be decoded", path)
    given = [times[at] for at in shown]
    timed = [tick for tick in given if tick is not None]
    ascending = all(one < two for one, two in pairwise(timed))
    # AVI has no times: those of frames that are not in the order of showing are guesses
    guessed = "avi" in formats and ascending and bool(stream.codec_context.has_b_frames)
    counted = guessed or len({*timed}) < len(shown)
    if len(timed) < len(shown):
        timed = [tick for at in shown if (tick := orders[at]) is not None]
        if len(timed) < len(shown):
            raise MediaError("undecodable", "the frames of the video have no times", path)
    if not counted:
        shown.sort(key=lambda at: times[at] or 0)
    ticks = sorted(timed)
    rates = tuple(float(rate) for rate in (stream.average_rate, stream.guessed_rate) if rate)
    assert stream.time_base is not None
    found = Survey(times, sizes, seeks, shown, ticks, durations[shown[-1]], counted, stream.time_base, rates)
    check_length(len(shown), found.timeline.seconds, path, limits)
    return found


def _is_hidden(packet: av.packet.Packet, codec: str) -> bool:
    """Whether a frame of VP8 or VP9 is only there for others to refer to (alternate reference frames)."""
    content = memoryview(packet)
    if codec.endswith("vp8"):
        return not content[0] & 0x10
    if content[-1] & 0xE0 == 0xC0:  # a superframe: hidden frames and one that is shown
        return False
    low = 0 if content[0] & 0x30 == 0x30 else 1  # profile 3 has a bit more
    return not content[0] >> low & 0b101  # neither show_existing_frame nor show_frame


def _check_end(path: Path, formats: set[str]) -> None:
    """Refuse files whose end is missing although all packets may look whole."""
    with path.open("rb") as file:
        head = file.read(512)
        there = file.seek(0, os.SEEK_END)
        file.seek(max(0, there - 64))
        tail = file.read()
    unfinished = False
    if "avi" in formats and head[:4] == b"RIFF":
        unfinished = 8 + int.from_bytes(head[4:8], "little") > there
    elif "matroska" in formats:
        unfinished = _segment_end(head) > there
    elif "gif" in formats:
        unfinished = not tail.rstrip(b"\0").endswith(b";")
    elif "apng" in formats:
        unfinished = b"IEND" not in tail
    if unfinished:
        raise MediaError("undecodable", "truncated video: the file ends before its last frame", path)


def _segment_end(head: bytes) -> int:
    """Where Matroska's one segment ends (RFC 8794, 4 and 5); 0 where it does not say so, as in live recordings."""

    def after(start: int) -> tuple[int, int]:
        """Where the content of an element begins whose name of four bytes begins at `start`, and its bytes."""
        length = 9 - head[start + 4].bit_length()
        most = (1 << 7 * length) - 1
        said = int.from_bytes(head[start + 4 : start + 4 + length], "big") & most
        return start + 4 + length, -1 if said == most else said

    try:
        begins, size = after(0)
        begins, size = after(begins + size)
    except IndexError:
        return 0
    return 0 if size < 0 else begins + size
