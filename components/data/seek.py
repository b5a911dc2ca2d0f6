"""Decodes chosen frames of an open video and as little else as they need; `media` opens files and keeps the limits.

Without certainty that the result is that of decoding from the beginning there is no result, and `media` decodes all.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import av.container
    import av.video.frame
    import av.video.stream

Frames = dict[int, "av.video.frame.VideoFrame"]
"""By place in the order of showing."""


@dataclass(frozen=True)
class Packets:
    """The compressed frames of a file, in the order of decoding."""

    times: list[int]
    """When each is shown, in the stream's time base; no two alike."""
    keys: list[int]
    """Positions where decoding can begin, ascending."""
    seeks: dict[int, int]
    """Per key, the time to seek to: when it is decoded, which is never later than when it is shown."""

    def start(self, position: int) -> int | None:
        """Where decoding must begin for one packet.

        A frame may follow a key frame in the file and yet be shown before it (open groups of pictures): it then needs
        the key frame before that one.
        """
        for key in reversed(self.keys[: bisect_right(self.keys, position)]):
            if self.times[key] <= self.times[position]:
                return key
        return None


def decode_at(
    container: av.container.InputContainer, choose: Callable[[int], Sequence[int]], last_time: float, most: int
) -> tuple[Sequence[int], Frames] | None:
    """The frames that `choose` names out of the number of frames, each group of pictures decoded at most once.

    Damage in what is decoded ends in None; damage elsewhere is not seen.

    Args:
        container: open and not yet read from; it is used up.
        choose: from the number of frames to places in the order of showing.
        last_time: seconds at which the latest frame may be shown.
        most: packets that the file may have.

    Returns:
        What was chosen and the frames by place, or None where decoding everything must decide.
    """
    import av

    stream = container.streams.video[0]
    stream.codec_context.options = {"err_detect": "explode"}
    try:
        packets = _read_packets(container, stream, last_time, most)
        if packets is None:
            return None
        shown = sorted(range(len(packets.times)), key=packets.times.__getitem__)
        chosen = choose(len(shown))
        places = set(chosen)
        if not places or max(places) >= len(shown):
            return None
        ranges = _ranges(packets, [shown[place] for place in places])
        if ranges is None:
            return None
        wanted = {packets.times[shown[place]]: place for place in places}
        found: Frames = {}
        for first, last in ranges:
            if not _decode_range(container, packets, first, last, wanted, found):
                return None
    except av.error.FFmpegError:
        return None
    return (chosen, found) if len(found) == len(places) else None


def _read_packets(
    container: av.container.InputContainer, stream: av.video.stream.VideoStream, last_time: float, most: int
) -> Packets | None:
    """Read the file once without decoding; this also completes the index of containers that lack one."""
    times: list[int] = []
    seeks: dict[int, int] = {}
    latest = last_time / stream.time_base if stream.time_base else 0
    for packet in container.demux(stream):
        if not packet.size:
            continue
        if (
            packet.pts is None
            or packet.pts - (times[0] if times else packet.pts) > latest
            or packet.is_corrupt
            or packet.is_discard
            or len(times) == most
        ):
            return None
        if packet.is_keyframe:
            seeks[len(times)] = packet.pts if packet.dts is None else packet.dts
        times.append(packet.pts)
    promised = stream.frames or len(times)
    return Packets(times, list(seeks), seeks) if len(set(times)) == len(times) == promised else None


def _ranges(packets: Packets, positions: Sequence[int]) -> list[tuple[int, int]] | None:
    """First and last packet of each stretch to decode, ascending and apart; each begins at a key frame."""
    ranges: list[tuple[int, int]] = []
    for position in sorted(positions):
        start = packets.start(position)
        if start is None:
            return None
        while ranges and start <= ranges[-1][1] + 1:
            start = min(start, ranges.pop()[0])
        ranges.append((start, position))
    return ranges


def _decode_range(
    container: av.container.InputContainer,
    packets: Packets,
    first: int,
    last: int,
    wanted: dict[int, int],
    found: Frames,
) -> bool:
    """Put the wanted frames of one stretch into `found`; False if the file is not as it was read before."""
    stream = container.streams.video[0]
    container.seek(packets.seeks[first], stream=stream)
    stream.codec_context.flush_buffers()
    position = -1
    for packet in container.demux(stream):
        if not packet.size:
            return False
        if position < 0:
            if packet.pts != packets.times[first]:
                if packet.pts is None or packet.pts > packets.times[first]:
                    return False
                continue
            position = first
        elif packet.pts != packets.times[position]:
            return False
        for frame in stream.codec_context.decode(packet):
            _keep(frame, wanted, found)
        position += 1
        if position > last:
            break
    for frame in stream.codec_context.decode(None):
        _keep(frame, wanted, found)
    return True


def _keep(frame: av.video.frame.VideoFrame, wanted: dict[int, int], found: Frames) -> None:
    place = wanted.get(frame.pts) if frame.pts is not None else None
    if place is not None and not frame.is_corrupt:
        found[place] = frame
