"""Decodes chosen frames of an open video and as little else as they need; `survey` says where they lie.

Without certainty that the result is that of decoding from the beginning there is no result, and `video` decodes all.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from typing import TYPE_CHECKING, TypeVar

from nvila.components.data.limits import decoded
from nvila.components.data.survey import Survey

if TYPE_CHECKING:
    import av.container
    import av.packet
    import av.video.frame
    import av.video.stream

T = TypeVar("T")


def decode_at(
    container: av.container.InputContainer,
    stream: av.video.stream.VideoStream,
    found: Survey,
    places: Collection[int],
    keep: Callable[[av.video.frame.VideoFrame], T],
    *,
    seeking: bool,
) -> dict[int, T] | None:
    """The frames at some places in the order of showing, each group of pictures decoded at most once.

    Damage in what is decoded ends in None; damage elsewhere is not seen.

    Args:
        container: open; unless `seeking` it has not been read from. It is used up.
        stream: the one of its streams that `found` is of; what it decodes with has not been opened yet.
        found: what the packets are.
        places: of the frames, within those that are shown.
        keep: makes of each of them what is kept.
        seeking: jump to the key frames; else all packets are read again, which finds them in every file.

    Returns:
        What is kept by place, or None where decoding everything must decide.
    """
    import av

    if seeking or stream.codec_context.name != "h264":  # this one calls it an error to begin at an open group
        stream.codec_context.options = {"err_detect": "explode"}
    frames: dict[int, T] = {}
    try:
        wanted = {found.ticks[place]: place for place in places}
        packets = container.demux(stream)
        for first, last in ranges(found, [found.shown[place] for place in places]):
            if seeking:
                container.seek(found.seeks.get(first, found.ticks[0]), stream=stream)
                packets = container.demux(stream)
            stream.codec_context.flush_buffers()
            for frame in _decode_range(packets, stream, found, first, last):
                decoded(frame.width * frame.height)
                if frame.is_corrupt:
                    return None
                place = None if frame.pts is None else wanted.get(frame.pts)
                if place is not None:
                    frames[place] = keep(frame)
    except av.error.FFmpegError:
        return None
    return frames if len(frames) == len(places) else None


def ranges(found: Survey, positions: Collection[int]) -> list[tuple[int, int]]:
    """First and last packet of each stretch to decode, ascending and apart; each begins where decoding can."""
    merged: list[tuple[int, int]] = []
    for position in sorted(positions):
        start = found.start(position)
        while merged and start <= merged[-1][1] + 1:
            start = min(start, merged.pop()[0])
        merged.append((start, position))
    return merged


def _decode_range(
    packets: Iterator[av.packet.Packet], stream: av.video.stream.VideoStream, found: Survey, first: int, last: int
) -> Iterator[av.video.frame.VideoFrame]:
    """The frames of one stretch; it ends early where the packets are not those that were read before."""
    position, began = -1, found.times[first]
    for packet in packets:
        if not packet.size:
            continue
        expected = max(position, first)
        if packet.pts != found.times[expected] or packet.size != found.sizes[expected]:
            if position < 0:
                continue  # seeking leads to somewhere before
            return
        decoded(0)
        position = expected
        leads = first and began is not None and packet.pts is not None and packet.pts < began
        if not leads:  # else it refers to frames before this stretch, and is none of those wanted
            yield from stream.codec_context.decode(packet)
        position += 1
        if position > last:
            break
    yield from stream.codec_context.decode(None)
