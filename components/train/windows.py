"""From samples that are ready to the passes of a global batch: a window of them is arranged at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace

from nvila.components.model.batch import Batch, collate
from nvila.components.model.positions import padded
from nvila.components.train.loader import Ready
from nvila.components.train.packing import Arrangement, Pass

WINDOW = 256
"""Samples that wait in memory to be arranged, at most, with a chunk of them."""
Arrange = Callable[[list[int]], Arrangement]
"""`packing.arrange` of lengths, with what a stage and a device give."""


class Windows:
    """Arranges a stage's samples.

    A global batch depends on its samples alone, so what is still open at a window's end is carried over into the next
    window of the same batch, and never further.
    """

    def __init__(self, arrange: Arrange, pad_id: int, *, flat: bool, multiple: int = 1) -> None:
        """`flat`: the rows of a packed pass lie in one, for a kernel that knows where samples begin. `multiple`: of
        what the positions of a pass are one, padding included."""
        self._arrange, self._pad_id, self._flat, self._multiple = arrange, pad_id, flat, multiple
        self.last: Arrangement | None = None
        """Of the newest window."""

    def passes(self, samples: Iterable[Ready]) -> Iterator[Batch]:
        """The passes of one step's samples, one of them at least."""
        waiting, wanted, made = Ready(), WINDOW, 0
        for ready in samples:
            waiting = Ready(*(getattr(waiting, name) + getattr(ready, name) for name in _FIELDS))
            if len(waiting.items) >= wanted:
                arrangement = self._arranged(waiting)
                *whole, open_pass = arrangement.passes
                for batch in self._batches(waiting, whole):
                    made += 1
                    yield batch
                wanted = WINDOW + sum(map(len, open_pass)) if whole else 2 * wanted
                left = [sample for row in open_pass for sample in row]
                skipped = [] if whole else waiting.skipped
                waiting = Ready(
                    [waiting.names[i] for i in left],
                    [waiting.items[i] for i in left],
                    [waiting.lengths[i] for i in left],
                    skipped,
                )
        if waiting.items:
            yield from self._batches(waiting, self._arranged(waiting).passes)
        elif waiting.skipped or not made:
            yield self.nothing(waiting)

    def nothing(self, ready: Ready | None = None) -> Batch:
        """A pass of no sample: one position of padding."""
        batch = collate([], self._pad_id, rows=[0] if self._flat else None)
        return replace(batch, skipped=tuple(ready.skipped) if ready else (), multiple=self._multiple)

    def _arranged(self, ready: Ready) -> Arrangement:
        self.last = self._arrange(ready.lengths)
        return self.last

    def _batches(self, ready: Ready, passes: list[Pass]) -> Iterator[Batch]:
        packed = self.last is not None and self.last.packing == "packed"
        for number, rows in enumerate(passes):
            order = [sample for row in rows for sample in row]
            row_of = [0 if self._flat else at for at, row in enumerate(rows) for _ in row] if packed else None
            batch = collate([ready.items[i] for i in order], self._pad_id, rows=row_of)
            lengths = tuple(ready.lengths[i] for i in order)
            in_one = packed and self._flat
            longest = sum(lengths) if in_one else max(sum(ready.lengths[i] for i in row) for row in rows)
            count = 1 if in_one else len(rows)
            yield replace(
                batch,
                samples=tuple(ready.names[i] for i in order),
                skipped=tuple(ready.skipped) if number == 0 else (),
                lengths=lengths,
                computed=count * padded(longest, count, self._multiple),
                multiple=self._multiple,
            )


_FIELDS = ("names", "items", "lengths", "skipped")
