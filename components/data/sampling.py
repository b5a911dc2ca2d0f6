"""Which frames of a clip a model sees: the one value that recipe, checkpoint and server carry, and the one rule."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

ROUNDING_SECONDS = 1e-3 + 1e-6
"""Times of a constant rate may be off by so much: Matroska rounds to milliseconds, the first frame's time as well."""


@dataclass(frozen=True)
class Timeline:
    """When the frames of a clip are shown, by a clock that starts at the first of them."""

    times: Sequence[float]
    """Seconds, ascending; the first is 0."""
    seconds: float
    """When the last frame ends."""
    rates: tuple[float, ...] = ()
    """Frames per second that the file claims, the likeliest first."""

    def rate(self) -> float | None:
        """Frames per second, where they stay for equal times; else None.

        A claimed rate counts where every frame is shown at its number divided by the rate; where none does, that of the
        first and last frame is tried.
        """
        if len(self.times) < 2:
            return None
        measured = (len(self.times) - 1) / self.times[-1] if self.times[-1] else 0.0
        for rate in (*self.rates, measured):
            if rate > 0 and all(abs(time - n / rate) <= ROUNDING_SECONDS for n, time in enumerate(self.times)):
                return rate
        return None


@dataclass(frozen=True)
class Sampling:
    """How many frames of a clip, and how they lie in it."""

    frames: int
    """How many; the most of them where `fps` is set."""
    fps: float = 0.0
    """Frames per second taken from the beginning of a clip; 0 spreads the frames evenly over all of it."""

    def places(self, count: int, rate: float | None = None) -> list[int]:
        """Places of the frames among the `count` that there are, at the clip's `rate` of frames per second.

        What has no rate is spread evenly: round(linspace(0, count - 1, frames)), halves to even. A short clip repeats
        frames.
        """
        if self.fps and rate is not None:
            return self._at_rate(count, rate)
        if self.frames == 1:
            return [0]
        step = (count - 1) / (self.frames - 1)  # numpy's own arithmetic: a step is rounded first
        return [*(round(index * step) for index in range(self.frames - 1)), count - 1]

    def of(self, timeline: Timeline) -> list[int]:
        """Places of the frames of a clip: at a constant rate as the reference has them, else those shown at the times.

        Without `fps` they are spread over the frames, as the reference does, however long each is shown.
        """
        if not self.fps:
            return self.places(len(timeline.times))
        rate = timeline.rate()
        if rate is not None:
            return self._at_rate(len(timeline.times), rate)
        step = 1.0 / self.fps
        number = max(1, math.ceil(min(timeline.seconds / step, self.frames)))
        return [bisect_right(timeline.times, k * step + 1e-6 if k else 0.0) - 1 for k in range(number)]

    def allows(self, count: int) -> bool:
        """Whether so many frames can have been taken of a clip."""
        return 0 < count <= self.frames if self.fps else count == self.frames

    def _at_rate(self, count: int, rate: float) -> list[int]:
        """Places of the frames shown at 0, 1 / fps, 2 / fps, ... seconds.

        The arithmetic is that of the reference, int(t * rate) over numpy's arange(0, count / rate, 1 / fps), to the
        last bit: k / fps instead of k * (1 / fps) names another frame in about one video of fifteen.
        """
        step = 1.0 / self.fps
        number = max(1, min(self.frames, math.ceil(min(count / rate / step, self.frames)))) if count else 0
        places = (int(k * step * rate) if k else 0 for k in range(number))
        return [place for place in places if place < count]

    def to_options(self) -> dict[str, Any]:
        """As vLLM names it in `--media-io-kwargs`."""
        return {"num_frames": self.frames, "fps": self.fps}

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> Sampling:
        """The inverse of `to_options`."""
        return cls(int(options["num_frames"]), float(options["fps"]))
