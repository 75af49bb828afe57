"""`buckets: auto`: how large a bucket should be, from what a warm-up measured.

Small buckets leave earlier, and each costs something. With r_i the time at which backward has finished bucket i, c(n)
the time in which the worker encodes and hands over a bucket of n floats (backward waits meanwhile), and a + b s that in
which s bytes reach the server, the buckets leave one after the other:

    late_i = late_{i-1} + c(n_i);   arrived_i = max(arrived_{i-1}, r_i + late_i) + a + b s_i

and the size is best for which the last arrives first.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from ps_elastic.vectors.layout import Bucket, Layout, Slot, cut

SMALLEST = 1 << 16  # bytes; a bucket of less is mostly header
_GAIN = 0.02  # of the time that a push in one piece takes: less is not worth a smaller bucket


class Line(NamedTuple):
    """A time that grows with a size: fixed + each * size, in seconds."""

    fixed: float
    each: float

    def at(self, size: float) -> float:
        return self.fixed + self.each * size

    @classmethod
    def through(cls, small: tuple[float, float], large: tuple[float, float]) -> Line:
        """Through two measured points (size, seconds)."""
        (n, t), (m, u) = small, large
        each = max(0.0, u - t) / (m - n)
        return cls(max(0.0, t - each * n), each)


class Pace(NamedTuple):
    """What a warm-up measured, in seconds.

    ready: of each tensor, from the start of a push until its gradient was final. leaving: of a bucket, by the
    number of floats. arriving: by the number of bytes, of a push of every worker at once. nbytes: that a float becomes.
    """

    ready: tuple[float, ...]
    leaving: Line
    arriving: Line
    nbytes: float


class Choice(NamedTuple):
    """What `buckets` is to be. late_s, whole_s: from the end of backward until a push is whole at the server, then and
    in one piece."""

    buckets: str | int
    count: int
    late_s: float
    whole_s: float

    @property
    def text(self) -> str:
        size = "whole" if self.buckets == "whole" else f"{self.buckets} bytes, {self.count} buckets"
        return (
            f"buckets: auto is {size}; a push should be whole at the server {1e3 * self.late_s:.2f} ms after backward, "
            f"in one piece {1e3 * self.whole_s:.2f} ms"
        )


def choose(layout: Layout, pace: Pace) -> Choice:
    """The size of buckets with which a push is whole at the server first; of about equals the largest."""
    whole_s = late_s(layout.slots, (Bucket(0, layout.size),), pace)
    best = Choice("whole", 1, whole_s, whole_s)
    size = 1 << (4 * layout.size - 1).bit_length()
    while (size := size >> 1) >= SMALLEST:
        buckets = tuple(cut(layout.slots, layout.size, size))
        late = late_s(layout.slots, buckets, pace)
        if late < best.late_s - _GAIN * (whole_s + max(pace.ready)):
            best = Choice(size, len(buckets), late, whole_s)
    return best


def late_s(slots: Sequence[Slot], buckets: Sequence[Bucket], pace: Pace) -> float:
    """How long after the end of backward the last bucket is at the server; bucket 0 leaves last."""
    end = max(pace.ready)
    ready, i = [0.0] * len(buckets), 0
    for slot, time in zip(slots, pace.ready, strict=True):
        while slot.offset >= buckets[i].stop:
            i += 1
        ready[i] = max(ready[i], time)
    order = sorted(range(1, len(buckets)), key=lambda i: (ready[i], -i))
    late = arrived = 0.0
    for i in (*order, 0):
        numel = buckets[i].numel
        late += pace.leaving.at(numel)
        arrived = max(arrived, (ready[i] if i else end) + late) + pace.arriving.at(pace.nbytes * numel)
    return arrived - end
